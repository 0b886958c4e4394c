package chunked

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// openAhead is how many chunks are opened before they are read, so that a store
// behind a network is not waited for between them.
const openAhead = 3

// reader reads chunks one after the other. From the second on they are opened by
// a goroutine, which ends at the last one, or when the reader is closed.
type reader struct {
	open   func(d digest.Digest, offset int64) (io.ReadCloser, error) // bounded by the context of Open
	cancel context.CancelFunc
	done   <-chan struct{} // closed by cancel
	// rest are the chunks that have not been opened, until the goroutine begins
	// and next gives them.
	rest []digest.Digest
	next chan opened

	cur  io.ReadCloser // nil: none
	of   digest.Digest // what cur reads
	left int64         // bytes of cur
	err  error
}

// opened is a chunk that was opened, or could not be.
type opened struct {
	d   digest.Digest
	r   io.ReadCloser
	err error
}

// newReader begins at the byte offset of the blob that is the chunks.
func newReader(ctx context.Context, store blob.Opener, chunks []digest.Digest, offset int64) (io.ReadCloser, error) {
	for len(chunks) > 0 && offset >= chunks[0].Size() {
		offset -= chunks[0].Size()
		chunks = chunks[1:]
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &reader{cancel: cancel, done: ctx.Done(), rest: chunks}
	r.open = func(d digest.Digest, offset int64) (io.ReadCloser, error) { return store.Open(ctx, d, offset) }
	if len(chunks) == 0 {
		return r, nil
	}
	r.rest = chunks[1:]
	cur, err := r.open(chunks[0], offset)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("chunk %s: %w", chunks[0], err)
	}
	r.cur, r.of, r.left = cur, chunks[0], chunks[0].Size()-offset
	return r, nil
}

func (r *reader) Read(p []byte) (int, error) {
	for r.err == nil && r.left == 0 {
		r.err = r.advance()
	}
	if r.err != nil {
		return 0, r.err
	}
	n, err := r.cur.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	if errors.Is(err, io.EOF) {
		if err = nil; r.left > 0 {
			err = fmt.Errorf("chunk %s: %w: the store's copy ends early", r.of, io.ErrUnexpectedEOF)
		}
	}
	if err != nil {
		r.err = err
	}
	return n, err
}

// advance goes to the next chunk. At the end it returns io.EOF.
func (r *reader) advance() error {
	if r.cur != nil {
		// Some stores compare checksums where they come to the end.
		n, err := r.cur.Read(make([]byte, 1))
		switch {
		case n > 0:
			err = errors.New("the store's copy is too long")
		case errors.Is(err, io.EOF):
			err = nil
		}
		err = errors.Join(err, r.cur.Close())
		r.cur = nil
		if err != nil {
			return fmt.Errorf("chunk %s: %w", r.of, err)
		}
	}
	if r.next == nil {
		if len(r.rest) == 0 {
			return io.EOF
		}
		r.next = make(chan opened, openAhead-1) // and one in the hand of the goroutine
		go r.openAll(r.rest, r.next)
	}
	o, ok := <-r.next
	if !ok {
		return io.EOF
	}
	if o.err != nil {
		return fmt.Errorf("chunk %s: %w", o.d, o.err)
	}
	r.cur, r.of, r.left = o.r, o.d, o.d.Size()
	return nil
}

// openAll gives the chunks to next, and closes it. It ends early where the reader
// is closed, and after an error.
func (r *reader) openAll(chunks []digest.Digest, next chan<- opened) {
	defer close(next)
	for _, d := range chunks {
		o := opened{d: d}
		o.r, o.err = r.open(d, 0)
		select {
		case next <- o:
		case <-r.done:
			if o.err == nil {
				_ = o.r.Close() // opened for reading
			}
			return
		}
		if o.err != nil {
			return
		}
	}
}

// Close waits for the goroutine.
func (r *reader) Close() error {
	r.cancel()
	if r.err == nil {
		r.err = errors.New("read of a closed blob")
	}
	var err error
	if r.cur != nil {
		err = r.cur.Close()
		r.cur = nil
	}
	if r.next != nil {
		for o := range r.next {
			if o.err == nil {
				err = errors.Join(err, o.r.Close())
			}
		}
	}
	return err //nolint:wrapcheck // the store's own words
}
