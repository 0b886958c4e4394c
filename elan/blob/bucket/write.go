package bucket

import (
	"context"
	"errors"
	"fmt"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// rounds bounds how often a write goes on to what another one left: each round
// but the last means that somebody else wrote or removed the same blob.
const rounds = 4

var errClosed = errors.New("the writer is closed")

// Create implements blob.Creator. A blob of at most ChunkBytes is one request,
// made by Commit. A larger one begins with a question, so that what is there is
// not sent again, and then goes in pieces. Until there is memory for its piece,
// Create waits.
func (s *Store) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	w, err := s.create(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("create blob %s: %w", d, err)
	}
	return w, nil
}

func (s *Store) create(ctx context.Context, d digest.Digest) (*writer, error) {
	if err := s.check(ctx, d); err != nil {
		return nil, err
	}
	if d.Size() > s.driver.MaxBytes {
		return nil, fmt.Errorf("%w: an object has at most %d bytes", blob.ErrTooLarge, s.driver.MaxBytes)
	}
	w := &writer{s: s, d: d, limit: s.limit(d), cancelled: ctx.Err}
	if d.IsEmpty() {
		w.sink = nothing{}
		return w, nil
	}
	w.buffered = min(w.limit, int64(s.o.ChunkBytes))
	if err := s.buffers.Acquire(ctx, w.buffered); err != nil {
		return nil, err
	}
	var err error
	if w.limit <= int64(s.o.ChunkBytes) {
		w.sink = &whole{put: func(data []byte) error { return s.putBlob(ctx, d, data) }, size: w.limit}
	} else {
		w.sink, err = s.upload(ctx, d)
	}
	if err != nil {
		s.buffers.Release(w.buffered)
		return nil, err
	}
	return w, nil
}

// writer counts the bytes of a blob on their way into its sink.
type writer struct {
	s         *Store
	d         digest.Digest
	limit     int64        // bytes at most
	cancelled func() error // the Err of the context that bounds the writing
	sink      Upload
	n         int64 // bytes written
	buffered  int64 // of s.buffers
	closed    bool
}

func (w *writer) Write(p []byte) (int, error) {
	if w.closed {
		return 0, errClosed
	}
	if err := w.cancelled(); err != nil {
		return 0, err
	}
	if int64(len(p)) > w.limit-w.n {
		w.n = w.limit + 1 // so that it can't be committed any more
		return 0, fmt.Errorf("%w: more than the %d bytes of %s", blob.ErrCorrupt, w.d.Size(), w.d)
	}
	n, err := w.sink.Write(p)
	w.n += int64(n)
	if err != nil {
		w.n = w.limit + 1
		return n, w.fail(err)
	}
	return n, nil
}

func (w *writer) Commit() error {
	if w.closed {
		return errClosed
	}
	if err := w.cancelled(); err != nil {
		return err
	}
	if w.n > w.limit || w.n != w.d.Size() && !w.s.o.Containers {
		return fmt.Errorf("%w: %d bytes of %s were written", blob.ErrCorrupt, w.n, w.d)
	}
	if err := w.sink.Commit(); err != nil {
		return w.fail(err)
	}
	return nil
}

// fail is err, or that of the context where it is what ended the request.
func (w *writer) fail(err error) error {
	if ctxErr := w.cancelled(); ctxErr != nil {
		return ctxErr
	}
	return class(err)
}

func (w *writer) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	err := w.sink.Abort()
	w.s.buffers.Release(w.buffered)
	return err
}

// nothing takes what need not be sent.
type nothing struct{}

func (nothing) Write(p []byte) (int, error) { return len(p), nil }
func (nothing) Commit() error               { return nil }
func (nothing) Abort() error                { return nil }

// whole collects a blob of one request.
type whole struct {
	put  func(data []byte) error
	size int64
	data []byte
}

// firstBytes bounds what is allocated on the word of a digest alone.
const firstBytes = 1 << 20

func (w *whole) Write(p []byte) (int, error) {
	if need := int64(len(w.data) + len(p)); need > int64(cap(w.data)) {
		grown := make([]byte, len(w.data), min(w.size, max(need, 2*int64(len(w.data)), firstBytes)))
		copy(grown, w.data)
		w.data = grown
	}
	w.data = append(w.data, p...)
	return len(p), nil
}

func (w *whole) Commit() error { return w.put(w.data) }

func (w *whole) Abort() error {
	w.data = nil
	return nil
}

// putBlob writes a blob at once, where it is not there.
func (s *Store) putBlob(ctx context.Context, d digest.Digest, data []byte) error {
	name, condition := s.blobName(d), Condition{Absent: true}
	for range rounds {
		err := s.try(ctx, "put", func(ctx context.Context) error {
			return written(s.driver.Put(ctx, name, data, condition))
		})
		if err == nil {
			s.touches.fresh(name)
			return nil
		}
		if !errors.Is(err, ErrChanged) {
			return err
		}
		st, err := s.statOne(ctx, name)
		if err != nil {
			return err
		}
		if s.usable(st, d) {
			return nil
		}
		condition = over(st)
	}
	return fmt.Errorf("%w: others keep changing %s", blob.ErrUnavailable, name)
}

// over is the condition for writing over what was found, which is not usable.
func over(st Stat) Condition {
	if !st.Exists {
		return Condition{Absent: true}
	}
	return Condition{Version: st.Version}
}

// upload begins a blob of several requests.
func (s *Store) upload(ctx context.Context, d digest.Digest) (Upload, error) {
	name := s.blobName(d)
	st, err := s.statOne(ctx, name)
	if err != nil {
		return nil, err
	}
	if s.usable(st, d) {
		return nothing{}, nil
	}
	size := d.Size()
	if s.o.Containers {
		size = -1
	}
	u, err := s.driver.Upload(ctx, name, size, over(st))
	s.metrics.request("upload", err)
	if err != nil {
		return nil, class(written(err))
	}
	return &large{Upload: u, s: s, name: name, confirm: func() error {
		st, err := s.statOne(ctx, name)
		if err == nil && !s.usable(st, d) {
			err = fmt.Errorf("%w: others keep changing %s", blob.ErrUnavailable, name)
		}
		return err
	}}, nil
}

// large is an Upload that may find, in the end, that another one was faster.
type large struct {
	Upload
	s       *Store
	name    string
	changed bool // the object was written by another; the rest need not be sent
	confirm func() error
}

func (l *large) Write(p []byte) (int, error) {
	if l.changed {
		return len(p), nil
	}
	n, err := l.Upload.Write(p)
	if errors.Is(err, ErrChanged) {
		l.changed = true
		return len(p), nil
	}
	return n, written(err)
}

func (l *large) Commit() error {
	if !l.changed {
		err := l.Upload.Commit()
		l.s.metrics.request("commit", err)
		if err == nil {
			l.s.touches.fresh(l.name)
			return nil
		}
		if !errors.Is(err, ErrChanged) {
			return written(err)
		}
	}
	return l.confirm()
}
