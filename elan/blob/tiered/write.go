package tiered

import (
	"context"
	"io"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Create implements blob.Creator. The bytes go to the authority, whose answers
// are the caller's, and to the upper tiers that take such a blob and do not fail.
func (s *Store) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	w, err := s.authority.Create(ctx, d)
	if err != nil {
		return nil, err //nolint:wrapcheck // the store's own
	}
	t := &writer{s: s, d: d, Writer: w}
	if d.IsEmpty() {
		return t, nil
	}
	for i := range s.uppers {
		tier := &s.uppers[i]
		if !tier.takes(d) {
			continue
		}
		w, err := tier.Store.Create(ctx, d)
		if err != nil {
			s.log.Debug("a tier does not take a blob", "tier", tier.Name, "digest", d, "error", err)
			continue
		}
		t.uppers = append(t.uppers, upperWriter{w, tier})
	}
	return t, nil
}

// writer writes to the authority, and beside it to upper tiers.
type writer struct {
	blob.Writer // the authority's
	s           *Store
	d           digest.Digest
	uppers      []upperWriter
}

type upperWriter struct {
	blob.Writer
	tier *Tier
}

func (w *writer) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	if err != nil {
		return n, err //nolint:wrapcheck // the store's own
	}
	kept := w.uppers[:0]
	for _, u := range w.uppers {
		if _, err := u.Write(p); err != nil {
			w.lost(u, err)
			continue
		}
		kept = append(kept, u)
	}
	w.uppers = kept
	return n, nil
}

// lost gives up a tier's copy.
func (w *writer) lost(u upperWriter, err error) {
	_ = u.Close() // it failed already
	w.s.log.Debug("a tier did not take a blob", "tier", u.tier.Name, "digest", w.d, "error", err)
}

// Commit commits to the authority, and then to those of the others that can.
func (w *writer) Commit() error {
	if err := w.Writer.Commit(); err != nil {
		return err //nolint:wrapcheck // the store's own
	}
	w.s.touches.told(w.d)
	for _, u := range w.uppers {
		if err := u.Commit(); err != nil {
			w.lost(u, err)
			continue
		}
		_ = u.Close() // there is nothing to lose any more
	}
	w.uppers = nil
	return nil
}

func (w *writer) Close() error {
	for _, u := range w.uppers {
		_ = u.Close() // nothing of it is wanted
	}
	w.uppers = nil
	return w.Writer.Close() //nolint:wrapcheck // the store's own
}

var _ io.WriteCloser = (*writer)(nil)
