package chunked

import (
	"bytes"
	"encoding/hex"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// FuzzDecode: whatever is read as a list, it is refused, or its sizes add up, and
// it is what encode writes.
func FuzzDecode(f *testing.F) {
	a, b := digest.Of(digest.SHA256, []byte("a")), digest.Of(digest.SHA256, []byte("bb"))
	for _, l := range []blob.ChunkList{{}, {Function: blob.ChunkFastCDC2020, Chunks: []digest.Digest{a, b, a}}} {
		v, err := encode(l)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(v, uint8(0), int64(4))
		f.Add(v, uint8(3), int64(4))
	}
	f.Fuzz(func(t *testing.T, v []byte, fn uint8, size int64) {
		function := digest.Functions()[int(fn)%len(digest.Functions())]
		d, err := digest.New(function, hex.EncodeToString(bytes.Repeat([]byte{1}, function.HexLen()/2)), size)
		if err != nil {
			return
		}
		l, err := decode(d.In(digest.SpaceOf("s")), v)
		if err != nil {
			return
		}
		sum := int64(0)
		for _, c := range l.Chunks {
			if c.Size() <= 0 || c.Space() != digest.SpaceOf("s") || c.Function() != function {
				t.Fatalf("chunk %s", c)
			}
			sum += c.Size()
		}
		if sum != size {
			t.Fatalf("chunks of %d bytes for %d", sum, size)
		}
		again, err := encode(l)
		if err != nil {
			t.Fatal(err)
		}
		back, err := decode(d.In(digest.SpaceOf("s")), again)
		if err != nil || len(back.Chunks) != len(l.Chunks) || back.Function != l.Function {
			t.Fatalf("%d chunks, %v; want %d", len(back.Chunks), err, len(l.Chunks))
		}
	})
}
