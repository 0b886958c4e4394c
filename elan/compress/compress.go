// Package compress is how blobs travel compressed: as zstd, in frames of at most
// a MiB on the way out, and in any frames, within bounds, on the way in.
//
// It trusts nothing that it decodes: the output is bounded by the size that is
// expected, the memory by that too or by the window, and the input by what
// output of that size can need. It does not compare digests (blob.Receive
// does), and it keeps nothing compressed at rest. The edge, elan/rpc, and
// elan/client use it, one Codec each.
//
// What is sent is a sequence of frames of FrameBytes each, which all decoders
// take for one stream (RFC 8878, section 3): a stream keeps no encoder, with its
// memory, while it waits for the network.
package compress

import (
	"fmt"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// FrameBytes is how much, uncompressed, should go into one frame: beyond it
	// the ratio hardly gains, and below it it loses.
	FrameBytes = 1 << 20
	// MaxWindowBytes is the largest window of a stream that is decoded: what
	// RFC 8878, section 3.1.1.1.2, asks decoders to have and encoders not to
	// exceed. The levels up to 19 of the zstd tool, and Bazel, stay within it.
	MaxWindowBytes = 8 << 20
	// SmallBytes is up to which size Decode is better than a Reader: it needs
	// no window, and gives up what it holds of the decoder when it returns.
	SmallBytes = 1 << 20

	// inputMargin is what a compressed blob may have beside twice its size:
	// headers, padding, and frames of little content.
	inputMargin = 64 << 10
)

// Codec compresses and decompresses. It is safe for concurrent use, starts no
// goroutines and needs no closing. It keeps memory of some MiB for each CPU, and
// a few more, which the garbage collector takes, after Readers.
type Codec struct {
	enc     *zstd.Encoder
	dec     *zstd.Decoder // for Decode: it has no window
	streams sync.Pool     // of *zstd.Decoder, for Readers
}

// New returns a Codec.
func New() (*Codec, error) {
	// As many at once as there are CPUs, and no more: others wait, since it is
	// computing and nothing else.
	cpus := runtime.GOMAXPROCS(0)
	enc, err := zstd.NewWriter(
		nil,
		zstd.WithEncoderConcurrency(cpus),
		zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithWindowSize(FrameBytes),
		zstd.WithLowerEncoderMem(true),
		// Receivers compare digests, so a checksum tells them nothing.
		zstd.WithEncoderCRC(false),
	)
	if err != nil {
		return nil, fmt.Errorf("compress: %w", err)
	}
	dec, err := zstd.NewReader(
		nil,
		zstd.WithDecoderConcurrency(cpus),
		zstd.WithDecodeAllCapLimit(true),
		// The output is the window here, so that a large one costs nothing.
		zstd.WithDecoderMaxWindow(zstd.MaxWindowSize),
	)
	if err != nil {
		return nil, fmt.Errorf("compress: %w", err)
	}
	return &Codec{enc: enc, dec: dec}, nil
}

// Append appends src to dst as one frame, and returns the extended slice. Its
// length grows by at most MaxFrame(len(src)), also where src is random. No bytes
// make a frame too.
func (c *Codec) Append(dst, src []byte) []byte { return c.enc.EncodeAll(src, dst) }

// MaxFrame is how many bytes a frame of n bytes can have.
func (c *Codec) MaxFrame(n int) int { return c.enc.MaxEncodedSize(n) }

// Decode returns what data, any number of whole frames, decompresses to, and
// allocates no more than size bytes for it. Where it is not frames, or these
// have not exactly size bytes in them, the error wraps digest.ErrMismatch. The
// caller bounds size, and owns the bytes.
func (c *Codec) Decode(data []byte, size int64) ([]byte, error) {
	out, err := c.dec.DecodeAll(data, make([]byte, 0, size))
	switch {
	case err != nil:
		return nil, malformed(err)
	case int64(len(out)) != size:
		return nil, wrongSize(int64(len(out)), size)
	}
	return out, nil
}

// MaxInput is how many compressed bytes are taken for a blob of size bytes, and
// is never negative. What has more is no sane encoder's work: it could go on for
// ever without adding a byte to the blob.
func MaxInput(size int64) int64 {
	if n := 2*size + inputMargin; n > size {
		return n
	}
	return 1<<63 - 1
}

// malformed is err of a decoder as the sender's fault.
func malformed(err error) error { return fmt.Errorf("%w: zstd: %w", digest.ErrMismatch, err) }

func wrongSize(got, want int64) error {
	return fmt.Errorf("%w: %d bytes after decompression, want %d", digest.ErrMismatch, got, want)
}

func tooManyBytes(size int64) error {
	return fmt.Errorf("%w: more than %d compressed bytes for %d", digest.ErrMismatch, MaxInput(size), size)
}
