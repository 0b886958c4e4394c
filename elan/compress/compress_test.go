package compress_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/compress"
	"github.com/mettle-build/mettle/elan/digest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newCodec(t testing.TB) *compress.Codec {
	t.Helper()
	c, err := compress.New()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// text is n bytes that compress well.
func text(n int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "//go:generate line %d of something that repeats itself, as sources do\n", i*i)
	}
	return b.Bytes()[:n]
}

// frames compresses data as elan does.
func frames(c *compress.Codec, data []byte) []byte {
	var z []byte
	for len(data) > compress.FrameBytes {
		z, data = c.Append(z, data[:compress.FrameBytes]), data[compress.FrameBytes:]
	}
	return c.Append(z, data)
}

// stream compresses data by an encoder that is set up as a client's may be.
func stream(t testing.TB, data []byte, opts ...zstd.EOption) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, append([]zstd.EOption{zstd.WithEncoderConcurrency(1)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// decoders are the two ways to decompress.
func decoders(c *compress.Codec) map[string]func(z []byte, size int64) ([]byte, error) {
	return map[string]func([]byte, int64) ([]byte, error){
		"Decode": c.Decode,
		"Reader": func(z []byte, size int64) ([]byte, error) { return readAll(c, bytes.NewReader(z), size) },
		"Reader of single bytes": func(z []byte, size int64) ([]byte, error) {
			return readAll(c, iotest.OneByteReader(bytes.NewReader(z)), size)
		},
	}
}

func readAll(c *compress.Codec, src io.Reader, size int64) ([]byte, error) {
	r, err := c.NewReader(src, size)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

func TestCodec(t *testing.T) {
	c := newCodec(t)
	for _, n := range []int{0, 1, 100, 1 << 10, 70_000, 1 << 20, 1<<20 + 1, 3<<20 + 5} {
		for kind, data := range map[string][]byte{"text": text(n), "random": blobtest.Random(1, n)} {
			z := frames(c, data)
			if n > 0 && n <= compress.FrameBytes && len(z) > c.MaxFrame(n) {
				t.Errorf("%s of %d bytes makes %d, more than MaxFrame", kind, n, len(z))
			}
			if n >= 1<<10 && kind == "text" && len(z) > n/3 {
				t.Errorf("%s of %d bytes makes %d", kind, n, len(z))
			}
			for name, decode := range decoders(c) {
				if got, err := decode(z, int64(n)); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s, %s of %d bytes: %d bytes, error %v", name, kind, n, len(got), err)
				}
			}
		}
	}
}

func TestDecode_what_clients_send(t *testing.T) {
	c := newCodec(t)
	data := text(300_000)
	half := len(data) / 2
	for name, z := range map[string][]byte{
		"default":           stream(t, data),
		"best":              stream(t, data, zstd.WithEncoderLevel(zstd.SpeedBestCompression)),
		"no checksum":       stream(t, data, zstd.WithEncoderCRC(false)),
		"largest window":    stream(t, data, zstd.WithWindowSize(compress.MaxWindowBytes)),
		"padded":            stream(t, data, zstd.WithEncoderPadding(4096)),
		"two frames":        append(stream(t, data[:half]), stream(t, data[half:])...),
		"empty frame first": append(stream(t, nil, zstd.WithZeroFrames(true)), stream(t, data)...),
		"empty frame last":  append(stream(t, data), stream(t, nil, zstd.WithZeroFrames(true))...),
		"skippable frame":   append([]byte{0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 'a', 'b', 'c'}, stream(t, data)...),
	} {
		for way, decode := range decoders(c) {
			if got, err := decode(z, int64(len(data))); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%s, %s: %d bytes, error %v", way, name, len(got), err)
			}
		}
	}
}

func TestDecode_refusals(t *testing.T) {
	c := newCodec(t)
	data := text(300_000)
	size := int64(len(data))
	z := stream(t, data)
	flipped := bytes.Clone(z)
	flipped[len(flipped)-1] ^= 1 // of the checksum
	for name, tc := range map[string]struct {
		z    []byte
		size int64
	}{
		"nothing":                 {z: nil, size: size},
		"not compressed":          {z: data, size: size},
		"truncated":               {z: z[:len(z)-5], size: size},
		"truncated in a header":   {z: z[:3], size: size},
		"one frame of two":        {z: stream(t, data[:1000]), size: size},
		"garbage after":           {z: append(bytes.Clone(z), "garbage"...), size: size},
		"one byte after":          {z: append(bytes.Clone(z), 0x28), size: size},
		"a truncated frame after": {z: append(bytes.Clone(z), z[:20]...), size: size},
		"a byte too many":         {z: z, size: size - 1},
		"a byte too few":          {z: z, size: size + 1},
		"checksum":                {z: flipped, size: size},
		"bomb":                    {z: stream(t, make([]byte, 64<<20)), size: 1000},
		"bomb of frames":          {z: bytes.Repeat(stream(t, make([]byte, 1<<20)), 10), size: 1000},
		"dictionary":              {z: []byte{0x28, 0xb5, 0x2f, 0xfd, 0x01, 0x50, 7, 1, 0, 0}, size: 0},
	} {
		for way, decode := range decoders(c) {
			if got, err := decode(tc.z, tc.size); !errors.Is(err, digest.ErrMismatch) {
				t.Errorf("%s, %s: %d bytes, error %v, want ErrMismatch", way, name, len(got), err)
			}
		}
	}
}

// header is the beginning of a frame with a window of 2^log bytes, and a block
// of five raw bytes, the last.
func header(log int) []byte {
	return []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, byte(log-10) << 3, 5<<3 | 1, 0, 0, 'h', 'e', 'l', 'l', 'o'}
}

func TestReader_window_is_bounded(t *testing.T) {
	c := newCodec(t)
	if got, err := readAll(c, bytes.NewReader(header(23)), 5); err != nil || string(got) != "hello" {
		t.Errorf("a window of 8 MiB: %q, %v", got, err)
	}
	if _, err := readAll(c, bytes.NewReader(header(24)), 5); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("a window of 16 MiB: %v, want ErrMismatch", err)
	}
	// One segment, of 1 GiB by its header, needs no window but all of itself.
	segment := []byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 0, 0x40, 5<<3 | 1, 0, 0, 'h', 'e', 'l', 'l', 'o'}
	if _, err := readAll(c, bytes.NewReader(segment), 1<<30); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("a segment of 1 GiB: %v, want ErrMismatch", err)
	}
}

// What a header declares may not be allocated for it.
func TestDecode_allocates_by_size_not_by_header(t *testing.T) {
	c := newCodec(t)
	for name, z := range map[string][]byte{
		"window of 512 MiB": header(29),
		"segment of 1 GiB":  {0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 0, 0x40, 5<<3 | 1, 0, 0, 'h', 'e', 'l', 'l', 'o'},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range 10 {
			if got, err := c.Decode(z, 5); err == nil && string(got) != "hello" {
				t.Errorf("%s: %q", name, got)
			}
		}
		runtime.ReadMemStats(&after)
		if n := (after.TotalAlloc - before.TotalAlloc) / 10; n > 1<<20 {
			t.Errorf("%s: %d bytes are allocated", name, n)
		}
	}
}

// endless is a source of frames without content.
type endless struct{ n int64 }

func (e *endless) Read(p []byte) (int, error) {
	empty := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0}
	for i := range p {
		p[i] = empty[e.n%int64(len(empty))]
		e.n++
	}
	return len(p), nil
}

func TestReader_input_is_bounded(t *testing.T) {
	src := &endless{}
	if _, err := readAll(newCodec(t), src, 1000); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("endless input: %v, want ErrMismatch", err)
	}
	if limit := compress.MaxInput(1000) + 1<<20; src.n > limit {
		t.Errorf("%d bytes were read, want at most %d", src.n, limit)
	}
	for _, size := range []int64{0, 1, 1 << 40, 1 << 61, 1 << 62, math.MaxInt64} {
		if n := compress.MaxInput(size); n < size {
			t.Errorf("MaxInput(%d) is %d", size, n)
		}
	}
}

func TestReader_errors_of_the_source_come_back(t *testing.T) {
	c := newCodec(t)
	broken := errors.New("broken")
	z := frames(c, text(100_000))
	for _, n := range []int{0, 1, 4, 5, 8, len(z) / 2, len(z)} {
		_, err := readAll(c, io.MultiReader(bytes.NewReader(z[:n]), iotest.ErrReader(broken)), 100_000)
		if !errors.Is(err, broken) || errors.Is(err, digest.ErrMismatch) {
			t.Errorf("broken after %d bytes: %v", n, err)
		}
	}
}

func TestReader_Close(t *testing.T) {
	c := newCodec(t)
	z := frames(c, text(3<<20))
	for i := range 10 {
		r, err := c.NewReader(bytes.NewReader(z), 3<<20)
		if err != nil {
			t.Fatal(err)
		}
		// In the middle of a frame.
		if _, err := io.ReadFull(r, make([]byte, 100_000*i)); err != nil {
			t.Fatal(err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if n, err := r.Read(make([]byte, 10)); n != 0 || !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("Read after Close: %d, %v", n, err)
		}
	}
	if got, err := readAll(c, bytes.NewReader(z), 3<<20); err != nil || !bytes.Equal(got, text(3<<20)) {
		t.Errorf("a Reader after others: %d bytes, %v", len(got), err)
	}
}

// FuzzDecode holds that any bytes decompress to exactly the size asked for or to
// an error, the same by both ways where the window is one that both take.
func FuzzDecode(f *testing.F) {
	c := newCodec(f)
	for _, data := range [][]byte{nil, []byte("hello"), text(1000), blobtest.Random(1, 1000)} {
		f.Add(frames(c, data), uint16(len(data))) //nolint:gosec // at most 1000
		f.Add(append(stream(f, data), stream(f, data)...), uint16(2*len(data)))
	}
	f.Add(header(23), uint16(5))
	f.Add(header(29), uint16(5))
	f.Fuzz(func(t *testing.T, z []byte, size uint16) {
		got, err := c.Decode(z, int64(size))
		if err == nil && len(got) != int(size) || err != nil && !errors.Is(err, digest.ErrMismatch) {
			t.Fatalf("Decode: %d bytes of %d, error %v", len(got), size, err)
		}
		read, readErr := readAll(c, bytes.NewReader(z), int64(size))
		if readErr == nil && len(read) != int(size) || readErr != nil && !errors.Is(readErr, digest.ErrMismatch) {
			t.Fatalf("Reader: %d bytes of %d, error %v", len(read), size, readErr)
		}
		if err == nil && readErr == nil && !bytes.Equal(got, read) {
			t.Fatalf("Decode and Reader differ")
		}
	})
}

func BenchmarkCodec(b *testing.B) {
	const n = 16 << 20
	c := newCodec(b)
	for kind, data := range map[string][]byte{"text": text(n), "random": blobtest.Random(1, n)} {
		z := frames(c, data)
		b.Run("Append/"+kind, func(b *testing.B) {
			b.SetBytes(n)
			b.ReportAllocs()
			buf := make([]byte, 0, c.MaxFrame(compress.FrameBytes))
			for b.Loop() {
				for off := 0; off < n; off += compress.FrameBytes {
					buf = c.Append(buf[:0], data[off:off+compress.FrameBytes])
				}
			}
			b.ReportMetric(float64(len(z))/n, "ratio")
		})
		b.Run("Decode/"+kind, func(b *testing.B) {
			b.SetBytes(n)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Decode(z, n); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("Reader/"+kind, func(b *testing.B) {
			b.SetBytes(n)
			b.ReportAllocs()
			buf := make([]byte, 256<<10)
			for b.Loop() {
				r, err := c.NewReader(bytes.NewReader(z), n)
				if err != nil {
					b.Fatal(err)
				}
				for err == nil {
					_, err = r.Read(buf)
				}
				if !errors.Is(err, io.EOF) {
					b.Fatal(err)
				}
				_ = r.Close()
			}
		})
	}
}
