package blob

import (
	"fmt"
	"hash"
	"sync/atomic"

	"github.com/mettle-build/mettle/elan/digest"
)

// PiecesWriter is a Writer that takes several pieces by one call, which saves a
// system call each. It is an ability, found by type assertion.
type PiecesWriter interface {
	Writer
	// WritePieces is Write for each of the pieces, one after the other. It keeps
	// neither them nor the slice.
	WritePieces(pieces [][]byte) (n int, err error)
}

// Verify returns a Writer that passes to w what it is given, and makes it
// visible only if it is the blob d: a Write past d's size and a Commit of other
// bytes fail with an error that wraps ErrCorrupt. It is Receive for bytes that
// come in pieces, over more than one call. Closing it closes w.
func Verify(w Writer, d digest.Digest) *Verifying {
	v := &Verifying{w: w, want: d, h: d.Function().New(d.Size())}
	v.pieces, _ = w.(PiecesWriter)
	return v
}

// Verifying is what Verify returns.
type Verifying struct {
	w      Writer
	pieces PiecesWriter // w, if it is one
	want   digest.Digest
	h      hash.Hash     // the goroutine's behind hashing, while there is one
	n      int64         // bytes written
	err    error         // of a Write; nothing becomes visible after it
	hashed chan struct{} // closed when the last WritePieces is hashed; nil: it is
}

// parallelBytes is from where on hashing and storing at the same time is worth
// a goroutine: both take some 0.1 ms then, and handing over a few µs.
const parallelBytes = 128 << 10

// Write implements Writer. It keeps nothing of p.
func (v *Verifying) Write(p []byte) (int, error) {
	before := v.n
	err := v.WritePieces([][]byte{p}, nil)
	v.Wait()
	return int(v.n - before), err
}

// WritePieces is Write for several pieces, which the store has when it returns,
// but which may yet have to be hashed: one call's while the next call's are
// received. Done, if it is not nil, is called once, by any goroutine, when the
// bytes are no longer needed, also where there is an error. The slice is not kept.
func (v *Verifying) WritePieces(pieces [][]byte, done func()) error {
	if done == nil {
		done = func() {}
	}
	total := int64(0)
	for _, p := range pieces {
		total += int64(len(p))
	}
	if v.err == nil && total > v.want.Size()-v.n {
		v.err = fmt.Errorf("receive blob %s: %w: more than its %d bytes", v.want, ErrCorrupt, v.want.Size())
	}
	if v.err != nil {
		done()
		return v.err
	}
	// All is hashed even if not all is stored: nothing comes of the blob then.
	v.Wait()
	if total < parallelBytes {
		v.hash(pieces)
	} else {
		done = v.hashBeside(append([][]byte(nil), pieces...), done)
	}
	n, err := v.store(pieces)
	done()
	v.n += int64(n)
	if err != nil {
		v.err = fmt.Errorf("receive blob %s: %w", v.want, err)
	}
	return v.err
}

func (v *Verifying) hash(pieces [][]byte) {
	for _, p := range pieces {
		v.h.Write(p)
	}
}

// hashBeside hashes in a goroutine, which Wait waits for. It returns what is to be
// called when the pieces are stored: it calls done when they are hashed as well.
func (v *Verifying) hashBeside(pieces [][]byte, done func()) func() {
	var ready atomic.Int32
	both := func() {
		if ready.Add(1) == 2 {
			done()
		}
	}
	v.hashed = make(chan struct{})
	go func() {
		defer close(v.hashed)
		v.hash(pieces)
		both()
	}()
	return both
}

// Wait returns when all that was written is hashed, and is no longer needed.
func (v *Verifying) Wait() {
	if v.hashed != nil {
		<-v.hashed
		v.hashed = nil
	}
}

// store passes pieces on to the store.
func (v *Verifying) store(pieces [][]byte) (total int, err error) {
	if v.pieces != nil && len(pieces) > 1 {
		return v.pieces.WritePieces(pieces) //nolint:wrapcheck // the caller does
	}
	for _, p := range pieces {
		n, err := v.w.Write(p)
		total += n
		if err != nil {
			return total, err //nolint:wrapcheck // the caller does
		}
	}
	return total, nil
}

// Commit implements Writer.
func (v *Verifying) Commit() error {
	v.Wait()
	if v.err != nil {
		return v.err
	}
	if v.n != v.want.Size() {
		return fmt.Errorf("receive blob %s: %w: only %d bytes", v.want, ErrCorrupt, v.n)
	}
	if got := digest.FromHash(v.want.Function(), v.h, v.n); got != v.want.Plain() {
		return fmt.Errorf("receive blob %s: %w: the bytes have digest %s", v.want, ErrCorrupt, got)
	}
	if err := v.w.Commit(); err != nil {
		return fmt.Errorf("commit blob %s: %w", v.want, err)
	}
	return nil
}

// Close implements Writer. It waits for what is being hashed.
func (v *Verifying) Close() error {
	v.Wait()
	return v.w.Close() //nolint:wrapcheck // it is w's own
}
