package tiered

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// part is a large blob on its way into an upper tier, at the speed of the tier
// below, and readable as far as it came where the upper tier's writer is an
// io.ReaderAt. Otherwise its readers wait for its end.
type part struct {
	tier   *Tier
	opened chan struct{} // closed when there is a source, or never will be

	mu      sync.RWMutex  // held for reading while at is used, and for writing when it ends
	at      io.ReaderAt   // nil: not readable, or not any more
	written int64         // bytes that at has
	grew    chan struct{} // closed and replaced when written grows
}

// errNotKept: the blob did not get into the tier, which says nothing of the blob.
var errNotKept = errors.New("the blob could not be kept")

// openFlight opens a large blob that is in no upper tier, and fills t with it.
func (s *Store) openFlight(ctx context.Context, t *Tier, d digest.Digest, offset int64) (io.ReadCloser, error) {
	f := s.joinLarge(ctx, t, d)
	if f == nil {
		return s.direct(ctx, d, offset)
	}
	select {
	case <-f.part.opened:
	case <-f.done:
	case <-ctx.Done():
		s.leave(f)
		return nil, ctx.Err()
	}
	select {
	case <-f.done:
		if f.err != nil {
			err := f.err
			s.leave(f)
			if errors.Is(err, errNotKept) {
				return s.direct(ctx, d, offset)
			}
			return nil, err
		}
	default:
	}
	s.hit(s.name, d)
	return &partReader{
		s: s, f: f, off: offset, cancelled: ctx.Err,
		wait: func(grew <-chan struct{}) {
			select {
			case <-grew:
			case <-f.done:
			case <-ctx.Done():
			}
		},
		kept: func(off int64) (io.ReadCloser, error) { return t.Store.Open(ctx, d, off) },
		rest: func(off int64) (io.ReadCloser, error) { return s.authority.Open(ctx, d, off) },
	}, nil
}

// joinLarge is join for a large blob.
func (s *Store) joinLarge(ctx context.Context, t *Tier, d digest.Digest) *flight {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f, ok := s.flights[d]; ok {
		f.readers++
		s.metrics.joined.Inc()
		return f
	}
	if !s.fills.TryAcquire(1) {
		return nil
	}
	f, own := s.begin(ctx, d)
	f.part = &part{tier: t, opened: make(chan struct{}), grew: make(chan struct{})}
	s.running.Go(func() {
		defer s.finish(f)
		f.err = s.carry(own, f)
		if own.Err() != nil && f.err != nil {
			f.err = errClosing // or nobody is there to see it
		}
		s.land(f)
	})
	return f
}

// carry is the flight of a large blob.
func (s *Store) carry(ctx context.Context, f *flight) error {
	r, err := s.authority.Open(ctx, f.d, 0)
	if err != nil {
		return err //nolint:wrapcheck // the store's own
	}
	defer r.Close() //nolint:errcheck // opened for reading
	w, err := f.part.tier.Store.Create(ctx, f.d)
	if err != nil {
		return s.notKept(f, err)
	}
	defer w.Close() //nolint:errcheck // after Commit there is nothing to lose, before it nothing to keep
	defer f.part.end()
	f.part.at, _ = w.(io.ReaderAt)
	close(f.part.opened)
	verified := blob.Verify(w, f.d)
	if err := f.part.copy(verified, r); err != nil {
		if errors.Is(err, errNotKept) {
			return s.notKept(f, err)
		}
		return err
	}
	f.part.end()
	if s.isGrounded(f) {
		return errNotKept
	}
	if err := verified.Commit(); err != nil {
		if errors.Is(err, blob.ErrCorrupt) {
			return err //nolint:wrapcheck // it says of what
		}
		return s.notKept(f, err)
	}
	s.metrics.fill(f.part.tier.Name, nil)
	return nil
}

// notKept counts and logs what kept a blob out of its tier.
func (s *Store) notKept(f *flight, err error) error {
	s.metrics.fill(f.part.tier.Name, err)
	s.log.Debug("a blob was not put into a tier", "tier", f.part.tier.Name, "digest", f.d, "error", err)
	return errNotKept
}

// copy copies all of r to w, and tells of each piece that is there.
func (p *part) copy(w io.Writer, r io.Reader) error {
	buf := make([]byte, copyBytes)
	for {
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); errors.Is(err, blob.ErrCorrupt) {
				return err // more bytes than there should be
			} else if err != nil {
				return fmt.Errorf("%w: %w", errNotKept, err)
			}
			p.grow(int64(n))
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil // whether all is here, Commit tells
		case err != nil:
			return err
		}
	}
}

func (p *part) grow(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.written += n
	close(p.grew)
	p.grew = make(chan struct{})
}

// end waits for the readers of at, and lets no more in.
func (p *part) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at = nil
}

// read reads what is there from off on, of a blob of size bytes: but for its
// last byte, which waits for all to be verified. 0 bytes: nothing yet, and grew
// is closed when there is more.
func (p *part) read(buf []byte, off, size int64) (n int, grew <-chan struct{}) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	there := min(p.written, size-1)
	if p.at == nil || off >= there {
		return 0, p.grew
	}
	// An error is not the blob's: it will be read elsewhere.
	n, _ = p.at.ReadAt(buf[:min(int64(len(buf)), there-off)], off)
	return n, p.grew
}

// partReader reads a large blob while it is being fetched, and then from where
// it was put.
type partReader struct {
	s   *Store
	f   *flight
	off int64

	cancelled  func() error // the Err of the context that bounds the reading
	wait       func(grew <-chan struct{})
	kept, rest func(off int64) (io.ReadCloser, error)

	after io.ReadCloser // what is read when the flight is over
	left  bool
	err   error // the end
}

// Read implements io.Reader.
func (r *partReader) Read(p []byte) (int, error) {
	if r.err != nil || len(p) == 0 {
		return 0, r.err
	}
	n, err := r.read(p)
	r.off += int64(n)
	if err != nil {
		r.err = err
	}
	return n, err
}

func (r *partReader) read(p []byte) (int, error) {
	for r.after == nil {
		if err := r.cancelled(); err != nil {
			return 0, err
		}
		over := false
		select {
		case <-r.f.done:
			over = true
		default:
		}
		if over {
			if err := r.land(); err != nil {
				return 0, err
			}
			break
		}
		n, grew := r.f.part.read(p, r.off, r.f.d.Size())
		if n > 0 {
			return n, nil
		}
		r.wait(grew)
	}
	return r.after.Read(p) //nolint:wrapcheck // the store's own
}

// land opens what the rest is read from.
func (r *partReader) land() (err error) {
	switch {
	case r.f.err == nil:
		if r.after, err = r.kept(r.off); err == nil {
			return nil
		}
		// The tier had it a moment ago, and has no room for it any more.
		fallthrough
	case errors.Is(r.f.err, errNotKept):
		r.after, err = r.rest(r.off)
		return err
	}
	return r.f.err
}

// Close implements io.Closer.
func (r *partReader) Close() error {
	if r.left {
		return nil
	}
	r.left = true
	if r.err == nil {
		r.err = io.ErrClosedPipe
	}
	r.s.leave(r.f)
	if r.after != nil {
		return r.after.Close() //nolint:wrapcheck // the store's own
	}
	return nil
}
