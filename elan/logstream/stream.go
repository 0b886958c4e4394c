package logstream

import (
	"container/list"
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/mettle-build/mettle/elan/resource"
)

// chunkBytes is the size of all parts of a stream but the last.
const chunkBytes = 32 << 10

// stream is one log stream.
type stream struct {
	name  resource.LogStreamName
	token string
	owner string
	timer *time.Timer   // calls timeout
	place *list.Element // in Streams.ended, guarded by Streams.mu

	// mu guards what is below.
	mu      sync.Mutex
	chunks  [][]byte // of chunkBytes each, but the last
	size    int64
	heard   time.Time     // of the writer
	holders int           // of Hold
	changed chan struct{} // closed and made anew with every change
	ended   bool
	err     error // why, where it was not finished
	dropped bool  // and its bytes with it
}

// left is for how long the writer may be silent from now on.
func (st *stream) left(timeout time.Duration) (ended bool, left time.Duration) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.holders > 0 {
		return st.ended, timeout
	}
	return st.ended, timeout - time.Since(st.heard)
}

func (st *stream) length() int64 {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.size
}

// tell wakes those who wait. The caller has mu.
func (st *stream) tell() {
	close(st.changed)
	st.changed = make(chan struct{})
}

func (st *stream) append(offset int64, data []byte, limit int64) (int64, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	switch {
	case st.ended && st.err != nil:
		return st.size, st.err
	case st.ended:
		return st.size, ErrFinished
	case offset != st.size:
		return st.size, fmt.Errorf("%w: it has %d bytes, and more are to be written at %d", ErrOffset, st.size, offset)
	case st.size+int64(len(data)) > limit:
		return st.size, fmt.Errorf("%w: it would have over %d bytes", ErrFull, limit)
	}
	st.heard = time.Now()
	if len(data) == 0 {
		return st.size, nil
	}
	st.size += int64(len(data))
	for len(data) > 0 {
		last := len(st.chunks) - 1
		if last < 0 || len(st.chunks[last]) == chunkBytes {
			st.chunks = append(st.chunks, nil)
			last++
		}
		n := min(len(data), chunkBytes-len(st.chunks[last]))
		st.chunks[last] = append(st.chunks[last], data[:n]...)
		data = data[n:]
	}
	st.tell()
	return st.size, nil
}

// read copies what there is at offset. Where there is nothing, it returns what is
// closed when there may be, or how the stream has ended.
func (st *stream) read(p []byte, offset int64) (n int, changed <-chan struct{}, err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	switch {
	case st.dropped:
		return 0, nil, fmt.Errorf("%w any more: it made room for others while it was read", ErrNotFound)
	case offset < st.size:
		for i := offset / chunkBytes; n < len(p) && offset < st.size; i++ {
			m := copy(p[n:], st.chunks[i][offset%chunkBytes:])
			n += m
			offset += int64(m)
		}
		return n, nil, nil
	case !st.ended:
		return 0, st.changed, nil
	case st.err != nil:
		return 0, nil, st.err
	case offset > st.size:
		return 0, nil, fmt.Errorf("%w: it has %d bytes, and is read from %d on", ErrOffset, st.size, offset)
	}
	return 0, nil, io.EOF
}

// drop gives up the bytes of one that is not among the Streams any more.
func (st *stream) drop() {
	st.timer.Stop()
	st.mu.Lock()
	defer st.mu.Unlock()
	st.chunks, st.dropped = nil, true
	st.tell()
}

// Reader reads a stream from an offset on, for one goroutine. It needs no closing.
type Reader struct {
	s      *Streams
	st     *stream
	offset int64
}

// Open opens a stream for reading. The offset may lie behind what there is so far.
func (s *Streams) Open(name string, offset int64) (*Reader, error) {
	st, err := s.find(name, false)
	if err != nil {
		return nil, err
	}
	if offset < 0 {
		return nil, fmt.Errorf("%w: %d is negative", ErrOffset, offset)
	}
	return &Reader{s: s, st: st, offset: offset}, nil
}

// Read waits until there is something, and reads it. Its errors are io.EOF at the
// end, that of ctx, and those of the package.
func (r *Reader) Read(ctx context.Context, p []byte) (int, error) {
	for {
		n, changed, err := r.st.read(p, r.offset)
		if err != nil {
			return 0, err
		}
		if n > 0 {
			r.offset += int64(n)
			return n, nil
		}
		select {
		case <-changed:
		case <-r.s.closed:
			return 0, ErrClosed
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}
