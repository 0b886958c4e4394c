// Package chunk cuts bytes into chunks whose ends depend on the content around
// them, so that what two inputs have in common becomes the same chunks, wherever
// it stands. It has the two functions of the Remote Execution API, FastCDC 2020
// and RepMaxCDC, exactly as other clients and servers cut: an input has one way
// to be cut by a function and its parameters.
//
// It computes; it knows neither digests nor stores. elan/blob/chunked calls it.
package chunk

import (
	"errors"
	"io"
	"iter"
)

// Function is a way to cut: *FastCDC or *RepMaxCDC. It is immutable and safe for
// concurrent use.
type Function interface {
	// MinBytes is the least size of a chunk but the last of an input, and
	// MaxBytes the largest of any.
	MinBytes() int
	MaxBytes() int
	// cutter starts an input.
	cutter() cutter
}

// A cutter cuts one input, from its beginning.
type cutter interface {
	// lookahead is how many bytes cut wants to see, unless the input ends before.
	lookahead() int
	// cut returns the length of the chunk with which data begins, 1 to len(data).
	// The data of the next call is what follows that chunk. It is not empty.
	cut(data []byte) int
}

// Chunks yields the chunks of data in their order. They are parts of data.
func Chunks(f Function, data []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		c := f.cutter()
		for len(data) > 0 {
			n := c.cut(data[:min(len(data), c.lookahead())])
			if !yield(data[:n:n]) {
				return
			}
			data = data[n:]
		}
	}
}

// Reader cuts what it reads. It holds twice the bytes that its Function looks
// ahead, at most 4 times MaxBytes for FastCDC. It is not safe for concurrent use.
type Reader struct {
	r   io.Reader
	c   cutter
	buf []byte
	// buf[start:end] was read and not yet returned.
	start, end int
	err        error // of r, after which nothing is read any more
}

// NewReader returns a Reader of r, which the caller keeps.
func NewReader(r io.Reader, f Function) *Reader {
	return &Reader{r: r, c: f.cutter()}
}

// Next returns the next chunk, which is never empty. It is valid until the next
// call. After the last one the error is io.EOF; any other is that of the
// underlying reader, and no chunk follows it.
func (r *Reader) Next() ([]byte, error) {
	if err := r.fill(); err != nil {
		return nil, err
	}
	if r.start == r.end {
		return nil, io.EOF
	}
	data := r.buf[r.start:min(r.end, r.start+r.c.lookahead())]
	n := r.c.cut(data)
	r.start += n
	return data[:n:n], nil
}

// firstBytes is what is allocated before it is known that the input is longer.
const firstBytes = 64 << 10

// fill reads until what is there is enough to look ahead, or the input ends.
func (r *Reader) fill() error {
	ahead := r.c.lookahead()
	for r.err == nil && r.end-r.start < ahead {
		if r.end == len(r.buf) {
			r.makeRoom(ahead)
		}
		n, err := r.r.Read(r.buf[r.end:])
		r.end += n
		r.err = err
	}
	if errors.Is(r.err, io.EOF) || r.err == nil {
		return nil
	}
	return r.err
}

// makeRoom moves what is not yet returned to the front of a buffer that has room
// behind it.
func (r *Reader) makeRoom(ahead int) {
	held := r.buf[r.start:r.end]
	if 2*len(held) > len(r.buf) || len(r.buf) == 0 {
		r.buf = make([]byte, min(2*ahead, max(firstBytes, 4*len(r.buf))))
	}
	r.end = copy(r.buf, held)
	r.start = 0
}
