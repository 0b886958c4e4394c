package compressed

import (
	"bytes"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// FuzzIsOneFrame: what passes for one frame, and can be decompressed, has
// nothing before and behind it; whatever it is, nothing panics.
func FuzzIsOneFrame(f *testing.F) {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		f.Fatal(err)
	}
	for _, data := range [][]byte{nil, []byte("x"), bytes.Repeat([]byte("abc"), 100_000), bytes.Repeat([]byte{0}, 1<<20)} {
		frame := enc.EncodeAll(data, nil)
		f.Add(frame)
		f.Add(append(bytes.Clone(frame), frame...))
	}
	f.Add([]byte("\x28\xb5\x2f\xfd\x00\x00\x01\x00\x00"))
	dec, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(8<<20))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		one := isOneFrame(data)
		if _, err := dec.DecodeAll(data, nil); err != nil || len(data) == 0 {
			return
		}
		var h zstd.Header
		if err := h.Decode(data); err != nil || h.Skippable {
			if one {
				t.Error("what begins with no frame passes for one")
			}
			return
		}
		// Each shorter prefix of one frame is none.
		if !one {
			return
		}
		for n := range data {
			if _, err := dec.DecodeAll(data[:n], nil); err == nil && n > 0 {
				t.Fatalf("passes for one frame, and its first %d of %d bytes decompress", n, len(data))
			}
		}
	})
}

func FuzzParseHeader(f *testing.F) {
	f.Add(appendHeader(nil, zstdForm, 1000), int64(1000))
	f.Add(appendHeader(nil, raw, 0), int64(1))
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		if size < 0 {
			return
		}
		form, err := parseHeader(b, size)
		if err == nil && !bytes.Equal(appendHeader(nil, form, size), b) {
			t.Errorf("%x is taken for a header, and is not what is written", b)
		}
	})
}
