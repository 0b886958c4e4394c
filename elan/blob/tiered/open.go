package tiered

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Open implements blob.Opener. The tiers are asked in their order; one that
// fails is passed over, and the answer of the authority is the call's.
func (s *Store) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := s.open(ctx, d, offset)
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	return r, nil
}

func (s *Store) open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	switch {
	case d.IsZero():
		return nil, fmt.Errorf("%w: the digest is absent", digest.ErrInvalid)
	case offset < 0 || offset > d.Size():
		return nil, fmt.Errorf("offset %d is outside of it", offset)
	case d.IsEmpty():
		return &bytesReader{Reader: bytes.NewReader(nil), cancelled: ctx.Err}, ctx.Err()
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if d.Size() <= WholeBytes {
		return s.openWhole(ctx, d, offset)
	}
	return s.openLarge(ctx, d, offset)
}

// hit counts a read, and passes it on to the authority.
func (s *Store) hit(tier string, d digest.Digest) {
	s.metrics.reads.WithLabelValues(tier).Inc()
	if tier == s.name {
		s.touches.told(d) // by the read itself
	} else {
		s.touches.add(d)
	}
}

// openWhole opens a blob that is served from memory, be it the first tier or a
// flight that verifies what it brings.
func (s *Store) openWhole(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if first := &s.uppers[0]; first.Trusted && first.takes(d) {
		r, err := first.Store.Open(ctx, d, offset)
		if err == nil {
			s.hit(first.Name, d)
			return r, nil
		}
		if ctx.Err() != nil {
			return nil, err //nolint:wrapcheck // the store's own
		}
	}
	f := s.join(ctx, d)
	if f == nil {
		return s.direct(ctx, d, offset)
	}
	select {
	case <-f.done:
	case <-ctx.Done():
		s.leave(f)
		return nil, ctx.Err()
	}
	if f.err != nil {
		s.leave(f)
		return nil, f.err
	}
	s.hit(f.from, d)
	r := &bytesReader{Reader: bytes.NewReader(f.data[offset:]), cancelled: ctx.Err}
	r.release = func() { s.leave(f) }
	return r, nil
}

// bytesReader reads what is in memory.
type bytesReader struct {
	*bytes.Reader
	cancelled func() error // the Err of the context that bounds the reading
	release   func()       // nil: nothing to do at the end
}

func (r *bytesReader) Read(p []byte) (int, error) {
	if err := r.cancelled(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

func (r *bytesReader) Close() error {
	if r.release != nil {
		r.release()
		r.release = nil
		r.Reader = bytes.NewReader(nil)
	}
	return nil
}

// openLarge opens a blob that streams.
func (s *Store) openLarge(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	keep := -1 // the tier to fill: the last that takes it
	for i := range s.uppers {
		t := &s.uppers[i]
		if !t.takes(d) {
			continue
		}
		keep = i
		r, err := t.Store.Open(ctx, d, offset)
		if err == nil {
			s.hit(t.Name, d)
			return s.watch(ctx, t, d, &watched{r: r, off: offset}), nil
		}
		if ctx.Err() != nil {
			return nil, err //nolint:wrapcheck // the store's own
		}
		s.passedOver(ctx, t, d, err)
	}
	if keep < 0 {
		return s.direct(ctx, d, offset)
	}
	return s.openFlight(ctx, &s.uppers[keep], d, offset)
}

// passedOver looks at the error for which an upper tier was passed over.
func (s *Store) passedOver(ctx context.Context, t *Tier, d digest.Digest, err error) {
	switch {
	case errors.Is(err, blob.ErrNotFound):
	case errors.Is(err, blob.ErrCorrupt):
		s.drop(ctx, t, d, err)
	default:
		s.log.Warn("a tier failed, and was passed over", "tier", t.Name, "digest", d, "error", err)
	}
}

// direct opens a blob of the authority, keeping nothing of it.
func (s *Store) direct(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := s.authority.Open(ctx, d, offset)
	if err == nil {
		s.hit(s.name, d)
	}
	return r, err //nolint:wrapcheck // the store's own
}

// watched reads a large blob from an upper tier. What is read from its first
// byte is verified, and the last bytes are held back if it is not d. Where
// the tier fails in the middle, the authority goes on.
type watched struct {
	r    io.ReadCloser
	d    digest.Digest
	off  int64
	hash hash.Hash // nil: not verified

	cancelled func() error                           // the Err of the context that bounds the reading
	drop      func(why error)                        // the upper tier's copy
	below     func(off int64) (io.ReadCloser, error) // nil: r is the authority's
	err       error                                  // the end
}

func (s *Store) watch(ctx context.Context, t *Tier, d digest.Digest, w *watched) *watched {
	w.d, w.cancelled = d, ctx.Err
	if !t.Trusted && w.off == 0 {
		w.hash = d.Function().New(d.Size())
	}
	w.drop = func(why error) { s.drop(ctx, t, d, why) }
	w.below = func(off int64) (io.ReadCloser, error) { return s.direct(ctx, d, off) }
	return w
}

// Read implements io.Reader.
func (w *watched) Read(p []byte) (int, error) {
	if w.err != nil || len(p) == 0 {
		return 0, w.err
	}
	for {
		n, err := w.r.Read(p)
		if n > 0 {
			return w.took(p[:n])
		}
		switch {
		case err == nil:
			continue
		case w.off == w.d.Size() || w.below == nil || w.cancelled() != nil:
			w.err = err
			return 0, err
		case errors.Is(err, io.EOF):
			err = fmt.Errorf("%w: the copy ends at byte %d of %d", blob.ErrCorrupt, w.off, w.d.Size())
		}
		if errors.Is(err, blob.ErrCorrupt) {
			w.drop(err)
		}
		r, err := w.below(w.off)
		if err != nil {
			w.err = err
			return 0, err
		}
		_ = w.r.Close() // it failed already
		w.r, w.below = r, nil
	}
}

// took counts in what was read.
func (w *watched) took(p []byte) (int, error) {
	w.off += int64(len(p))
	if w.hash == nil {
		return len(p), nil
	}
	w.hash.Write(p)
	if w.off == w.d.Size() {
		if got := digest.FromHash(w.d.Function(), w.hash, w.off); got != w.d.Plain() {
			w.err = fmt.Errorf("%w: the bytes have digest %s", blob.ErrCorrupt, got)
			w.drop(w.err)
			return 0, w.err
		}
	}
	return len(p), nil
}

// Close implements io.Closer.
func (w *watched) Close() error {
	if w.err == nil {
		w.err = io.ErrClosedPipe
	}
	return w.r.Close() //nolint:wrapcheck // the store's own
}
