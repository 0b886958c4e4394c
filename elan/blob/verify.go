package blob

import (
	"fmt"
	"hash"

	"github.com/mettle-build/mettle/elan/digest"
)

// Verify returns a Writer that passes to w what it is given, and makes it
// visible only if it is the blob d: a Write past d's size and a Commit of other
// bytes fail with an error that wraps ErrCorrupt. It is Receive for bytes that
// come in pieces, over more than one call. Closing it closes w.
func Verify(w Writer, d digest.Digest) Writer {
	return &verifying{w: w, want: d, h: d.Function().New(d.Size())}
}

type verifying struct {
	w    Writer
	want digest.Digest
	h    hash.Hash
	n    int64 // bytes written
	err  error // of a Write; nothing becomes visible after it
}

func (v *verifying) Write(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	if int64(len(p)) > v.want.Size()-v.n {
		v.err = fmt.Errorf("receive blob %s: %w: more than its %d bytes", v.want, ErrCorrupt, v.want.Size())
		return 0, v.err
	}
	n, err := v.write(p)
	v.n += int64(n)
	if err != nil {
		v.err = fmt.Errorf("receive blob %s: %w", v.want, err)
	}
	return n, v.err
}

// parallelBytes is from where on hashing and storing at the same time is worth
// a goroutine: both take some 0.1 ms then, and handing over a few µs.
const parallelBytes = 128 << 10

// write hashes and stores p, all of which is hashed even if not all is stored:
// nothing comes of the blob then.
func (v *verifying) write(p []byte) (int, error) {
	if len(p) < parallelBytes {
		v.h.Write(p)
		return v.w.Write(p) //nolint:wrapcheck // the caller does
	}
	hashed := make(chan struct{})
	go func() {
		defer close(hashed)
		v.h.Write(p)
	}()
	defer func() { <-hashed }()
	return v.w.Write(p) //nolint:wrapcheck // the caller does
}

func (v *verifying) Commit() error {
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

func (v *verifying) Close() error { return v.w.Close() } //nolint:wrapcheck // it is w's own
