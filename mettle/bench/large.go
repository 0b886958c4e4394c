package bench

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"hash"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/klauspost/compress/zstd"

	"github.com/mettle-build/mettle/elan/digest"
)

// memoryStreams is how many streams the subject memory has at once.
const memoryStreams = 16

func zstdScenarios(o Options) []scenario {
	size := float64(o.StreamBytes) / gib
	name := fmt.Sprintf("%.4g MiB", float64(o.StreamBytes)/mib)
	of := func(name string, floor floorKind, maxOps uint64, prepare func(context.Context, *client) (op, error)) scenario {
		return scenario{name: name, clients: 1, unit: "GiB/s", perOp: size, floor: floor, floorPerOp: size, maxOps: maxOps, prepare: prepare}
	}
	return []scenario{
		of("read "+name, floorRead, 0, func(ctx context.Context, c *client) (op, error) { return prepareZstdRead(ctx, c, o.StreamBytes) }),
		of("write "+name, floorWrite, uint64(maxWritten/o.StreamBytes), //nolint:gosec // both are positive
			func(_ context.Context, c *client) (op, error) { return prepareZstdWrite(c, o.StreamBytes) }),
	}
}

// zstdSeries is a series of blobs of text, of which a third remains compressed.
type zstdSeries struct {
	*series
	enc    *zstd.Encoder
	frames [][]byte // of all but the last part of what the blobs share
	last   []byte   // that part
}

func (c *client) newZstdSeries(size int) (*zstdSeries, error) {
	if !slices.Contains(c.caps.GetCacheCapabilities().GetSupportedCompressors(), repb.Compressor_ZSTD) {
		return nil, fmt.Errorf("%w: the server does not take zstd", errSkip)
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return nil, err
	}
	s := &zstdSeries{series: c.newSeries(size), enc: enc}
	s.shared = text(size - tailSize)
	s.state = c.fn.New(int64(size))
	s.state.Write(s.shared)
	for s.last = s.shared; len(s.last) > streamMessage; s.last = s.last[streamMessage:] {
		s.frames = append(s.frames, enc.EncodeAll(s.last[:streamMessage], nil))
	}
	return s, nil
}

// text is n bytes in lines of words and numbers, as compilers read and write.
func text(n int) []byte {
	b := make([]byte, 0, n+128)
	for len(b) < n {
		var r [12]byte
		_, _ = rand.Read(r[:]) // never fails, by its contract
		b = append(b, "        return internal_function_name("...)
		b = hex.AppendEncode(b, r[:])
		b = append(b, ", kSomeConstant);\n"...)
	}
	return b[:n]
}

// parts are the frames of number n of the series.
func (s *zstdSeries) parts(tail []byte) [][]byte {
	last := append(append(make([]byte, 0, len(s.last)+len(tail)), s.last...), tail...)
	return append(slices.Clone(s.frames), s.enc.EncodeAll(last, nil))
}

func prepareZstdWrite(c *client, size int) (op, error) {
	if err := c.needStorage(); err != nil {
		return nil, err
	}
	blobs, err := c.newZstdSeries(size)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, n uint64) error {
		d, tail := blobs.blob(n)
		return c.writeZstd(ctx, d, blobs.parts(tail))
	}, nil
}

func (c *client) writeZstd(ctx context.Context, d digest.Digest, parts [][]byte) error {
	size := int64(0)
	for _, p := range parts {
		size += int64(len(p))
	}
	got, err := c.write(ctx, "uploads/"+newUUID()+"/compressed-blobs/zstd/"+d.String(), size, parts)
	// It may count what was sent or, as some do, the blob.
	if err == nil && got != size && got != d.Size() {
		err = answerError("ByteStream.Write: committed %d bytes of %d", got, size)
	}
	return err
}

// prepareZstdRead uploads a few blobs, which the ops read in turn.
func prepareZstdRead(ctx context.Context, c *client, size int) (op, error) {
	if err := c.needStorage(); err != nil {
		return nil, err
	}
	blobs, err := c.newZstdSeries(size)
	if err != nil {
		return nil, err
	}
	var ds [4]digest.Digest
	for i := range ds {
		d, tail := blobs.blob(uint64(i)) //nolint:gosec // not negative
		if err := c.writeZstd(ctx, d, blobs.parts(tail)); err != nil {
			return nil, err
		}
		ds[i] = d
	}
	return func(ctx context.Context, n uint64) error {
		d := ds[n%uint64(len(ds))]
		got, err := c.read(ctx, "compressed-blobs/zstd/"+d.String())
		if err == nil && (got == 0 || got > d.Size()*2/3) {
			err = answerError("ByteStream.Read: %d compressed bytes of %d", got, d.Size())
		}
		return err
	}, nil
}

func memoryScenarios(o Options) []scenario {
	size := float64(o.MemoryBytes) / gib
	of := func(what string, floor floorKind, prepare func(context.Context, *client) (op, error)) scenario {
		return scenario{
			name: fmt.Sprintf("%s %d × %.4g MiB", what, memoryStreams, float64(o.MemoryBytes)/mib), clients: memoryStreams,
			unit: "GiB/s", perOp: size, floor: floor, floorPerOp: size, once: true, prepare: prepare,
		}
	}
	return []scenario{
		of("write", floorWrite, func(_ context.Context, c *client) (op, error) { return prepareMemoryWrite(c, o.MemoryBytes) }),
		of("read", floorRead, func(ctx context.Context, c *client) (op, error) { return prepareMemoryRead(ctx, c, o.MemoryBytes) }),
	}
}

// repeated is a series of blobs of one part that is repeated, so that this process
// need not hold them: the series, and what makes one of it of its tail.
func (c *client) repeated(size int) (blobs *series, parts func(tail []byte) [][]byte, err error) {
	if err := c.needStorage(); err != nil {
		return nil, nil, err
	}
	part := c.newSeries(streamMessage + tailSize).shared
	n := size/streamMessage - 1
	blobs = &series{fn: c.fn, size: int64(size), state: c.fn.New(int64(size))}
	if _, ok := blobs.state.(hash.Cloner); !ok {
		return nil, nil, fmt.Errorf("%w: with digest function %v each blob would have to be hashed anew here", errSkip, c.fn)
	}
	for range n {
		blobs.state.Write(part)
	}
	end := part[:streamMessage-tailSize]
	blobs.state.Write(end)
	return blobs, func(tail []byte) [][]byte { return append(slices.Repeat([][]byte{part}, n), end, tail) }, nil
}

func prepareMemoryWrite(c *client, size int) (op, error) {
	blobs, parts, err := c.repeated(size)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, n uint64) error {
		d, tail := blobs.blob(n)
		return c.writeBytes(ctx, d, parts(tail)...)
	}, nil
}

// prepareMemoryRead uploads one blob, which all clients read.
func prepareMemoryRead(ctx context.Context, c *client, size int) (op, error) {
	blobs, parts, err := c.repeated(size)
	if err != nil {
		return nil, err
	}
	d, tail := blobs.blob(0)
	if err := c.writeBytes(ctx, d, parts(tail)...); err != nil {
		return nil, err
	}
	return func(ctx context.Context, _ uint64) error { return c.readBytes(ctx, d) }, nil
}
