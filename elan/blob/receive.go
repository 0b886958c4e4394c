package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/digest"
)

// copyBufferSize is that of the buffers between a source and a store: large
// enough that system calls do not count beside hashing.
const copyBufferSize = 256 << 10

//nolint:gochecknoglobals // a pool is shared by design
var copyBuffers = sync.Pool{New: func() any { b := make([]byte, copyBufferSize); return &b }}

// Receive reads the blob d from r to its end, verifies hash and size on the
// way, and puts it into c. The blob is visible only if Receive returns nil.
// Bytes that are not d's are an error that wraps ErrCorrupt; the errors of r and
// c come back wrapped. The caller keeps r.
func Receive(ctx context.Context, c Creator, d digest.Digest, r io.Reader) error {
	w, err := c.Create(ctx, d)
	if err != nil {
		return fmt.Errorf("create blob %s: %w", d, err)
	}
	defer w.Close() //nolint:errcheck // after Commit there is nothing to lose, before it nothing to keep
	v := Verify(w, d)
	if err := v.readFrom(r); err != nil {
		return err
	}
	return v.Commit()
}

// readFrom writes what r brings to its end. One byte more than is due tells a blob
// that is too long. One part is hashed while the next is read.
func (v *Verifying) readFrom(r io.Reader) error {
	n := 1
	if v.want.Size() >= parallelBytes {
		n = 2
	}
	bufs := make(chan *[]byte, n) // those that are not in use
	for range n {
		b := copyBuffers.Get().(*[]byte)
		defer copyBuffers.Put(b)
		bufs <- b
	}
	defer v.Wait() // before the buffers go to others
	for {
		b := <-bufs
		p := *b
		if due := v.want.Size() - v.n; due < copyBufferSize {
			p = p[:due+1]
		}
		n, err := readSome(r, p)
		if err := v.WritePieces([][]byte{p[:n]}, func() { bufs <- b }); err != nil {
			return err
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("receive blob %s: %w", v.want, err)
		}
	}
}

// readSome reads until p is full, or an error.
func readSome(r io.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = r.Read(p[n:])
		n += m
	}
	return n, err
}

// ReceiveBytes is Receive for bytes that are in memory already.
func ReceiveBytes(ctx context.Context, c Creator, d digest.Digest, data []byte) error {
	if int64(len(data)) != d.Size() {
		return fmt.Errorf("receive blob %s: %w: %d bytes", d, ErrCorrupt, len(data))
	}
	if got := digest.Of(d.Function(), data); got != d.Plain() {
		return fmt.Errorf("receive blob %s: %w: the bytes have digest %s", d, ErrCorrupt, got)
	}
	return WriteBytes(ctx, c, d, data)
}

// PutBytes computes the digest of data and puts it into c.
func PutBytes(ctx context.Context, c Creator, fn digest.Function, data []byte) (digest.Digest, error) {
	d := digest.Of(fn, data)
	return d, WriteBytes(ctx, c, d, data)
}

// PutMessage marshals m deterministically and puts it into c.
func PutMessage(ctx context.Context, c Creator, fn digest.Function, m proto.Message) (digest.Digest, error) {
	d, data, err := digest.OfMessage(fn, m)
	if err != nil {
		return digest.Digest{}, err
	}
	return d, WriteBytes(ctx, c, d, data)
}

// WriteBytes puts data, the bytes of d, into c. It does not verify them: its
// callers have made the digest of them, or ReceiveBytes is for them.
func WriteBytes(ctx context.Context, c Creator, d digest.Digest, data []byte) error {
	if done, err := writeWhole(ctx, c, d, data); done {
		return err
	}
	w, err := c.Create(ctx, d)
	if err != nil {
		return fmt.Errorf("create blob %s: %w", d, err)
	}
	defer w.Close() //nolint:errcheck // as in Receive
	if _, err := w.Write(data); err != nil {
		return fmt.Errorf("write blob %s: %w", d, err)
	}
	if err := w.Commit(); err != nil {
		return fmt.Errorf("commit blob %s: %w", d, err)
	}
	return nil
}

// ReadAll returns the bytes of d, which the caller owns. A blob of over
// maxBytes is an error that wraps ErrTooLarge, before anything is allocated for
// it; one that is shorter or longer in the store than d says wraps ErrCorrupt.
func ReadAll(ctx context.Context, o Opener, d digest.Digest, maxBytes int64) ([]byte, error) {
	if d.Size() > maxBytes {
		return nil, fmt.Errorf("read blob %s: %w: at most %d bytes are read at once", d, ErrTooLarge, maxBytes)
	}
	data := make([]byte, d.Size())
	if err := ReadInto(ctx, o, d, data); err != nil {
		return nil, err
	}
	return data, nil
}

// ReadInto is ReadAll into data, of which it needs as many bytes as d has.
func ReadInto(ctx context.Context, o Opener, d digest.Digest, data []byte) error {
	if int64(len(data)) != d.Size() {
		return fmt.Errorf("read blob %s: there is room for %d bytes", d, len(data))
	}
	if done, err := readWhole(ctx, o, d, data); done {
		return err
	}
	r, err := o.Open(ctx, d, 0)
	if err != nil {
		return fmt.Errorf("open blob %s: %w", d, err)
	}
	defer r.Close() //nolint:errcheck // opened for reading
	if _, err := io.ReadFull(r, data); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: the store's copy ends early", ErrCorrupt)
		}
		return fmt.Errorf("read blob %s: %w", d, err)
	}
	return nil
}

// ReadMessage reads the blob d, of at most maxBytes, into m. Bytes that are not
// such a message wrap ErrMalformed.
func ReadMessage(ctx context.Context, o Opener, d digest.Digest, maxBytes int64, m proto.Message) error {
	data, err := ReadAll(ctx, o, d, maxBytes)
	if err != nil {
		return err
	}
	return UnmarshalMessage(d, data, m)
}

// UnmarshalMessage is what ReadMessage does with data, the bytes of d.
func UnmarshalMessage(d digest.Digest, data []byte, m proto.Message) error {
	if err := proto.Unmarshal(data, m); err != nil {
		return fmt.Errorf("blob %s is not a %s message: %w: %w", d, m.ProtoReflect().Descriptor().Name(), ErrMalformed, err)
	}
	return nil
}

// ErrMalformed: a blob is whole and right by its digest, and yet not the message
// that it was to be.
var ErrMalformed = errors.New("malformed message")
