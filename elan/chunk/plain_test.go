package chunk_test

import (
	"bytes"
	"crypto/md5" //nolint:gosec // the table is made of it
	"encoding/binary"
	"slices"
	"testing"

	"github.com/mettle-build/mettle/elan/chunk"
)

// What follows says the same as the package in the plainest way, each function
// for itself, without looking at any byte only once.

func plainGear(b byte) uint64 {
	var in [64]byte
	for i := range in {
		in[i] = b
	}
	sum := md5.Sum(in[:]) //nolint:gosec // as above
	return binary.BigEndian.Uint64(sum[:8])
}

// TestGear has values of the table that the implementations of FastCDC share.
func TestGear(t *testing.T) {
	for b, want := range map[byte]uint64{0: 0x3b5d3c7d207e37dc, 1: 0x784d68ba91123086, 16: 0x03864632648e248f, 255: 0xaabd2b2a451504e1} {
		if got := plainGear(b); got != want {
			t.Errorf("gear[%d] = %#x, want %#x", b, got, want)
		}
	}
}

// plainMasks are those for averages of 1, 4 and 16 KiB at the second level.
func plainMasks(average int) (rare, easy uint64) {
	switch average {
	case 1 << 10:
		return 0x0000d90103530000, 0x0000001800035300
	case 4 << 10:
		return 0x0000d90313530000, 0x0000590003530000
	case 16 << 10:
		return 0x0000d90303537000, 0x0000d90103530000
	}
	panic("no mask")
}

func plainFastCDC(average int, seed uint32, data []byte) (ns []int) {
	rare, easy := plainMasks(average)
	for len(data) > 0 {
		n := min(len(data), 4*average)
		if n > average/4 {
			hash := uint64(0)
			for i := average / 4; i < n&^1; i++ {
				hash = hash<<1 + (gearTable[data[i]] ^ uint64(seed))
				if i < average && hash&rare == 0 || i >= average && hash&easy == 0 {
					n = i
				}
			}
		}
		ns = append(ns, n)
		data = data[n:]
	}
	return ns
}

func plainRepMaxCDC(minimum, horizon int, data []byte) (ns []int) {
	for len(data) > 0 {
		n := len(data)
		if n >= 2*minimum {
			hashes := plainHashes(data[:min(n, 2*minimum+horizon)])
			last := min(n-minimum, minimum+horizon)
			for {
				n = minimum
				for at := minimum + 1; at <= last; at++ {
					if hashes[at] > hashes[n] {
						n = at
					}
				}
				if n < 2*minimum {
					break
				}
				last = n - minimum
			}
		}
		ns = append(ns, n)
		data = data[n:]
	}
	return ns
}

// plainHashes are the hashes of the bytes before each place; what is more than 64
// bytes away has been shifted out.
func plainHashes(data []byte) []uint64 {
	hashes := make([]uint64, 1, len(data)+1)
	for i, b := range data {
		hashes = append(hashes, hashes[i]<<1+gearTable[b])
	}
	return hashes
}

//nolint:gochecknoglobals // an immutable table
var gearTable = func() (t [256]uint64) {
	for b := range t {
		t[b] = plainGear(byte(b)) //nolint:gosec // below 256
	}
	return t
}()

// FuzzChunks: whatever is cut, the chunks are the input, their sizes within the
// bounds, a stream is cut as memory is, and both as the plain functions do.
func FuzzChunks(f *testing.F) {
	f.Add([]byte(""), uint16(0), uint16(0), uint8(0))
	f.Add(random(1, 5000), uint16(10), uint16(300), uint8(1))
	f.Add(make([]byte, 3000), uint16(0), uint16(64), uint8(3))
	f.Fuzz(func(t *testing.T, data []byte, minimum, horizon uint16, repeat uint8) {
		if len(data) > 5000 {
			return
		}
		in := slices.Repeat(data, 1+int(repeat)%4)
		m, h := 64+int(minimum)%500, int(horizon)%3000
		for _, c := range []struct {
			f    chunk.Function
			want []int
		}{
			{fastCDC(t, 1<<10, uint32(minimum)), plainFastCDC(1<<10, uint32(minimum), in)},
			{repMaxCDC(t, m, h), plainRepMaxCDC(m, h, in)},
		} {
			got := lengths(t, c.f, in)
			checkSizes(t, c.f, got)
			if !slices.Equal(got, c.want) {
				t.Fatalf("%T cuts %v, want %v", c.f, got, c.want)
			}
			if streamed := read(t, c.f, bytes.NewReader(in), in); !slices.Equal(streamed, got) {
				t.Fatalf("%T cuts a stream as %v, want %v", c.f, streamed, got)
			}
		}
	})
}
