package retry

import (
	"context"
	"errors"
	"io"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Store is a store whose calls are tried again. It is safe for concurrent use.
type Store struct {
	blob.Store
	r *Retrier
}

var (
	_ blob.Store       = (*Store)(nil)
	_ blob.Repeater    = (*Store)(nil)
	_ blob.WholeReader = (*Store)(nil)
	_ blob.WholeWriter = (*Store)(nil)
	_ blob.BatchReader = (*Store)(nil)
	_ blob.BatchWriter = (*Store)(nil)
	_ blob.TreeReader  = (*Store)(nil)
)

// Store tries again what is asked of s.
func (r *Retrier) Store(s blob.Store) *Store { return &Store{Store: s, r: r} }

// Unwrap returns the store inside.
func (s *Store) Unwrap() blob.Store { return s.Store }

// Repeat implements blob.Repeater.
func (s *Store) Repeat(ctx context.Context, f func(ctx context.Context) error) error {
	return s.r.Repeat(ctx, f)
}

// FindMissing implements blob.Finder.
func (s *Store) FindMissing(ctx context.Context, ds []digest.Digest) (missing []digest.Digest, err error) {
	err = s.r.try(ctx, func() (err error) {
		missing, err = s.Store.FindMissing(ctx, ds)
		return err //nolint:wrapcheck // the store's own
	})
	return missing, err
}

// ReadWhole implements blob.WholeReader where the store inside does.
func (s *Store) ReadWhole(ctx context.Context, d digest.Digest, data []byte) error {
	w, ok := s.Store.(blob.WholeReader)
	if !ok {
		return errors.ErrUnsupported
	}
	return s.r.try(ctx, func() error { return w.ReadWhole(ctx, d, data) })
}

// WriteWhole implements blob.WholeWriter for all blobs: data is at hand, so that
// nothing is kept of it.
func (s *Store) WriteWhole(ctx context.Context, d digest.Digest, data []byte) error {
	return s.r.try(ctx, func() error { return blob.WriteBytes(ctx, s.Store, d, data) })
}

// Open implements blob.Opener.
func (s *Store) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r := &reader{offset: offset}
	r.open = func(offset int64) (io.ReadCloser, error) { return s.Store.Open(ctx, d, offset) }
	r.repeat = func(err error, f func() error) error { return s.r.again(ctx, err, f) }
	if err := s.r.try(ctx, r.reopen); err != nil {
		return nil, err
	}
	return r, nil
}

// reader reads a blob, from as many readers of the store as it takes.
type reader struct {
	open   func(offset int64) (io.ReadCloser, error)
	repeat func(err error, f func() error) error
	in     io.ReadCloser
	offset int64 // of what is read next, in the blob
	closed bool
}

func (r *reader) reopen() error {
	in, err := r.open(r.offset)
	if err != nil {
		return err
	}
	r.in = in
	return nil
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	n, err := r.in.Read(p)
	if err == nil || !errors.Is(err, blob.ErrUnavailable) || r.closed {
		r.offset += int64(n)
		return n, err //nolint:wrapcheck // the store's own
	}
	if n > 0 { // the next Read fails again, with nothing
		r.offset += int64(n)
		return n, nil
	}
	err = r.repeat(err, func() (err error) {
		n = 0
		_ = r.in.Close() // it has told what is wrong already
		if err := r.reopen(); err != nil {
			return err
		}
		n, err = r.in.Read(p)
		return err //nolint:wrapcheck // the store's own
	})
	r.offset += int64(n)
	return n, err
}

// WriteTo implements io.WriterTo, because the reader inside may save a copy by it.
func (r *reader) WriteTo(w io.Writer) (total int64, err error) {
	out := &taker{w: w}
	once := func() error {
		n, err := io.Copy(out, r.in)
		r.offset += n
		total += n
		if out.err != nil {
			return nil // it is the writer's, whatever class it has
		}
		return err //nolint:wrapcheck // the store's own
	}
	err = once()
	for errors.Is(err, blob.ErrUnavailable) && !r.closed {
		var next error // after some bytes more: that break is given its own time
		err = r.repeat(err, func() error {
			_ = r.in.Close() // as in Read
			if err := r.reopen(); err != nil {
				return err
			}
			from := r.offset
			err := once()
			if r.offset > from {
				next, err = err, nil
			}
			return err
		})
		if err != nil {
			break
		}
		err = next
	}
	return total, errors.Join(out.err, err)
}

// taker is a writer whose errors are known from those of a reader.
type taker struct {
	w   io.Writer
	err error
}

func (t *taker) Write(p []byte) (n int, err error) {
	n, t.err = t.w.Write(p)
	return n, t.err //nolint:wrapcheck // the writer's own
}

// Close implements io.Closer.
func (r *reader) Close() error {
	r.closed = true
	return r.in.Close() //nolint:wrapcheck // the store's own
}
