package retry

import (
	"context"
	"errors"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Create implements blob.Creator.
func (s *Store) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	w := &writer{}
	w.create = func() (blob.Writer, error) { return s.Store.Create(ctx, d) }
	if err := s.r.try(ctx, w.recreate); err != nil {
		return nil, err
	}
	if d.Size() > s.r.o.KeepBytes {
		return w.in, nil // only who has the bytes can write them again
	}
	w.repeat = func(err error, f func() error) error { return s.r.again(ctx, err, f) }
	return w, nil
}

// writer writes a small blob, to as many writers of the store as it takes.
type writer struct {
	create func() (blob.Writer, error)
	repeat func(err error, f func() error) error
	in     blob.Writer
	kept   []byte // all that was written
	ended  bool   // committed or closed
}

func (w *writer) recreate() error {
	in, err := w.create()
	if err != nil {
		return err
	}
	w.in = in
	return nil
}

// Write implements io.Writer. It keeps a copy of p.
func (w *writer) Write(p []byte) (int, error) {
	n, err := w.in.Write(p)
	if w.ended || (err != nil && !errors.Is(err, blob.ErrUnavailable)) {
		return n, err //nolint:wrapcheck // the store's own
	}
	// What the store takes is bounded by the blob's size, and so is this.
	w.kept = append(w.kept, p...)
	if err == nil {
		return n, nil
	}
	if err := w.repeat(err, w.again); err != nil {
		return 0, err
	}
	return len(p), nil
}

// again writes what was written before to a new writer.
func (w *writer) again() error {
	_ = w.in.Close() // nothing comes of it
	if err := w.recreate(); err != nil {
		return err
	}
	_, err := w.in.Write(w.kept)
	return err //nolint:wrapcheck // the store's own
}

// Commit implements blob.Writer.
func (w *writer) Commit() error {
	err := w.in.Commit()
	if !w.ended && errors.Is(err, blob.ErrUnavailable) {
		err = w.repeat(err, func() error {
			if err := w.again(); err != nil {
				return err
			}
			return w.in.Commit()
		})
	}
	w.ended, w.kept = true, nil
	return err //nolint:wrapcheck // the store's own
}

// Close implements blob.Writer.
func (w *writer) Close() error {
	w.ended, w.kept = true, nil
	return w.in.Close() //nolint:wrapcheck // the store's own
}
