package compress

import (
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/mettle-build/mettle/elan/digest"
)

// NewReader returns a Reader of the size bytes that src decompresses to. It
// takes a window's memory, at most MaxWindowBytes and a little more, until it is
// closed; the caller bounds how many there are at once. The caller keeps src,
// and frees the Reader by Close.
func (c *Codec) NewReader(src io.Reader, size int64) (*Reader, error) {
	r := &Reader{codec: c, size: size, in: input{r: src, size: size}}
	r.dec, _ = c.streams.Get().(*zstd.Decoder)
	if r.dec == nil {
		var err error
		if r.dec, err = newStreamDecoder(); err != nil {
			return nil, err
		}
	}
	if err := r.dec.Reset(&r.in); err != nil {
		return nil, fmt.Errorf("compress: %w", err)
	}
	return r, nil
}

// newStreamDecoder returns a decoder that works in the goroutine of its reader,
// as Codec promises.
func newStreamDecoder() (*zstd.Decoder, error) {
	d, err := zstd.NewReader(
		nil,
		zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(MaxWindowBytes),
		// A frame of one segment has no window but its size, which this bounds.
		zstd.WithDecoderMaxMemory(MaxWindowBytes),
	)
	if err != nil {
		return nil, fmt.Errorf("compress: %w", err)
	}
	return d, nil
}

// A Reader decompresses a stream. Errors of its source come back as they are;
// what is no zstd, or not exactly the size expected, is an error that wraps
// digest.ErrMismatch. It decodes at most a block more than that size. It is used
// by one goroutine at a time.
type Reader struct {
	codec *Codec
	dec   *zstd.Decoder // nil after Close
	in    input
	size  int64
	n     int64 // bytes read
	err   error
}

// Read implements io.Reader.
func (r *Reader) Read(p []byte) (int, error) {
	if r.err != nil || len(p) == 0 {
		return 0, r.err
	}
	// One byte more than is due tells a blob that is too long.
	if room := r.size - r.n; int64(len(p)) > room {
		p = p[:room+1]
	}
	n, err := r.dec.Read(p)
	r.n += int64(n)
	switch {
	case r.n > r.size:
		n, err = 0, fmt.Errorf("%w: more than %d bytes after decompression", digest.ErrMismatch, r.size)
	case r.in.err != nil && !errors.Is(r.in.err, io.EOF):
		// What the decoder says of an input that failed means nothing.
		n, err = 0, r.in.err
	case errors.Is(err, io.EOF) && r.n != r.size:
		n, err = 0, wrongSize(r.n, r.size)
	case err != nil && !errors.Is(err, io.EOF):
		n, err = 0, malformed(err)
	}
	r.err = err
	return n, err
}

// Close frees what the Reader holds. It may be called twice, and does not close
// the source.
func (r *Reader) Close() error {
	if r.dec == nil {
		return nil
	}
	dec := r.dec
	r.dec, r.err = nil, io.ErrClosedPipe
	if err := dec.Reset(nil); err == nil {
		r.codec.streams.Put(dec)
	}
	return nil
}

// input is the source of a Reader: bounded, and it remembers how it ended.
type input struct {
	r    io.Reader
	size int64 // of the blob
	n    int64 // bytes read
	err  error
}

func (in *input) Read(p []byte) (int, error) {
	if in.err != nil {
		return 0, in.err
	}
	n, err := in.r.Read(p)
	if in.n += int64(n); in.n > MaxInput(in.size) {
		err = tooManyBytes(in.size)
	}
	in.err = err
	return n, err
}
