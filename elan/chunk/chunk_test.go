package chunk_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/mettle-build/mettle/elan/chunk"
)

func fastCDC(tb testing.TB, average int, seed uint32) *chunk.FastCDC {
	tb.Helper()
	f, err := chunk.NewFastCDC(average, seed)
	if err != nil {
		tb.Fatal(err)
	}
	return f
}

func repMaxCDC(tb testing.TB, minimum, horizon int) *chunk.RepMaxCDC {
	tb.Helper()
	f, err := chunk.NewRepMaxCDC(minimum, horizon)
	if err != nil {
		tb.Fatal(err)
	}
	return f
}

// lengths cuts data in memory, and fails the test unless the chunks are data.
func lengths(tb testing.TB, f chunk.Function, data []byte) (ns []int) {
	tb.Helper()
	rest := data
	for c := range chunk.Chunks(f, data) {
		if !bytes.HasPrefix(rest, c) {
			tb.Fatalf("chunk %d is not what follows in the input", len(ns))
		}
		rest = rest[len(c):]
		ns = append(ns, len(c))
	}
	if len(rest) > 0 {
		tb.Fatalf("the last %d of %d bytes are in no chunk", len(rest), len(data))
	}
	return ns
}

// read cuts what r reads, of which data are the bytes.
func read(tb testing.TB, f chunk.Function, r io.Reader, data []byte) (ns []int) {
	tb.Helper()
	cr := chunk.NewReader(r, f)
	for {
		c, err := cr.Next()
		if errors.Is(err, io.EOF) {
			if len(data) > 0 {
				tb.Fatalf("%d bytes are in no chunk", len(data))
			}
			return ns
		}
		if err != nil {
			tb.Fatal(err)
		}
		if !bytes.HasPrefix(data, c) {
			tb.Fatalf("chunk %d is not what follows in the input", len(ns))
		}
		data = data[len(c):]
		ns = append(ns, len(c))
	}
}

// checkSizes: all chunks are within the bounds, but for the last of FastCDC, and
// for an input that is shorter than the minimum.
func checkSizes(tb testing.TB, f chunk.Function, ns []int) {
	tb.Helper()
	for i, n := range ns {
		_, lastMayBeLess := f.(*chunk.FastCDC)
		if n > f.MaxBytes() || n < f.MinBytes() && (i < len(ns)-1 || !lastMayBeLess && i > 0) {
			tb.Fatalf("chunk %d of %d has %d bytes, want %d to %d", i, len(ns), n, f.MinBytes(), f.MaxBytes())
		}
	}
}

func TestFastCDC_againstPlain(t *testing.T) {
	data := random(2, 400_001)
	for _, average := range []int{1 << 10, 4 << 10, 16 << 10} {
		for _, seed := range []uint32{0, 666, 1<<32 - 1} {
			for _, in := range [][]byte{data, data[:average/4], data[:average/4+1], data[:average], data[:4*average+1], make([]byte, 100_000)} {
				f := fastCDC(t, average, seed)
				got := lengths(t, f, in)
				checkSizes(t, f, got)
				if diff := cmp.Diff(plainFastCDC(average, seed, in), got); diff != "" {
					t.Errorf("average %d, seed %d, %d bytes: -plain +got:\n%s", average, seed, len(in), diff)
				}
			}
		}
	}
}

func TestFastCDC_seedMatters(t *testing.T) {
	data := random(3, 1<<20)
	if a, b := lengths(t, fastCDC(t, 4<<10, 0), data), lengths(t, fastCDC(t, 4<<10, 1), data); slices.Equal(a, b) {
		t.Error("two seeds cut alike")
	}
}

// TestFastCDC_specVectors needs the picture that the vectors of the API's
// repository were made of, which is not kept here.
func TestFastCDC_specVectors(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("testdata", "SekienAkashita.jpg"))
	if err != nil {
		t.Skip("put SekienAkashita.jpg, from the repository that fastcdc2020_test_vectors.txt names, into testdata")
	}
	if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != "d9e749d9367fc908876749d6502eb212fee88c9a94892fb07da5ef3ba8bc39ed" {
		t.Fatal("it is another picture")
	}
	for seed, want := range map[uint32][]int{
		0:   {19186, 19279, 17354, 16387, 19940, 17320},
		666: {17635, 17334, 19136, 17467, 23593, 14301},
	} {
		// The vectors have a maximum of 65,535 bytes, which no chunk of them nears.
		if diff := cmp.Diff(want, lengths(t, fastCDC(t, 16<<10, seed), data)); diff != "" {
			t.Errorf("seed %d: -want +got:\n%s", seed, diff)
		}
	}
	want := []int{7026, 5198, 5310, 4271, 5278, 5588, 5017, 6761, 5541, 7612, 5501, 4695, 4362, 6221, 7190, 5858, 4382, 8022, 5633}
	if diff := cmp.Diff(want, lengths(t, repMaxCDC(t, 4096, 32768), data)); diff != "" {
		t.Errorf("RepMaxCDC: -want +got:\n%s", diff)
	}
}

// TestRepMaxCDC_golden has the cuts that buildbarn/go-cdc v0.0.10 makes of the
// same bytes.
func TestRepMaxCDC_golden(t *testing.T) {
	data := random(1, 1<<20)
	for _, c := range []struct {
		minimum, horizon, chunks int
		first                    []int
		sum                      string // of fmt.Sprint of all lengths
	}{
		{4096, 32768, 189, []int{5402, 7723, 5143, 4449, 4205, 4311}, "4e1bfd221eabdc79"},
		{1024, 0, 1024, []int{1024, 1024, 1024, 1024, 1024, 1024}, "e14dc3785c7e7de7"},
		{16384, 20000, 46, []int{26922, 19095, 27168, 23644, 21408, 24428}, "a63feb63c8f253cf"},
	} {
		got := lengths(t, repMaxCDC(t, c.minimum, c.horizon), data)
		sum := sha256.Sum256([]byte(fmt.Sprint(got)))
		if len(got) != c.chunks || !slices.Equal(got[:len(c.first)], c.first) || hex.EncodeToString(sum[:8]) != c.sum {
			t.Errorf("minimum %d, horizon %d: %d chunks %v..., want %d, %v...", c.minimum, c.horizon, len(got), got[:6], c.chunks, c.first)
		}
	}
}

func TestRepMaxCDC_againstPlain(t *testing.T) {
	const minimum = 100
	for name, data := range map[string][]byte{
		"random":   random(4, 30_011),
		"constant": make([]byte, 30_011),
		"periodic": bytes.Repeat([]byte("0123456"), 4000),
		"two_bits": lowEntropy(random(5, 30_011)),
	} {
		for _, horizon := range []int{0, 1, 63, 100, 199, 350, 800, 5000} {
			f := repMaxCDC(t, minimum, horizon)
			got := lengths(t, f, data)
			checkSizes(t, f, got)
			if diff := cmp.Diff(plainRepMaxCDC(minimum, horizon, data), got); diff != "" {
				t.Errorf("%s, horizon %d: -plain +got:\n%s", name, horizon, diff)
			}
		}
	}
	for size := range 4 * minimum {
		data := random(uint64(size), size)
		if got, want := lengths(t, repMaxCDC(t, minimum, 50), data), plainRepMaxCDC(minimum, 50, data); !slices.Equal(got, want) {
			t.Errorf("%d bytes: %v, want %v", size, got, want)
		}
	}
}

func lowEntropy(data []byte) []byte {
	for i := range data {
		data[i] &= 3
	}
	return data
}

// TestEdits: an edit changes the chunks around it and no others.
func TestEdits(t *testing.T) {
	data := random(6, 4<<20)
	for name, f := range map[string]chunk.Function{"fastcdc": fastCDC(t, 16<<10, 0), "repmaxcdc": repMaxCDC(t, 8<<10, 64<<10)} {
		for _, at := range []int{0, 1_000_000, len(data)} {
			edited := slices.Concat(data[:at], []byte("x"), data[at:])
			before := map[[32]byte]bool{}
			for c := range chunk.Chunks(f, data) {
				before[sha256.Sum256(c)] = true
			}
			fresh, total := 0, 0
			for c := range chunk.Chunks(f, edited) {
				total++
				if !before[sha256.Sum256(c)] {
					fresh++
				}
			}
			if fresh == 0 || fresh > 4 || total < 100 {
				t.Errorf("%s: a byte put in at %d makes %d of %d chunks new", name, at, fresh, total)
			}
		}
	}
}

func TestReader(t *testing.T) {
	data := random(7, 300_000)
	for name, f := range map[string]chunk.Function{
		"fastcdc": fastCDC(t, 1<<10, 0), "fastcdc_one_chunk": fastCDC(t, 8<<20, 0),
		"repmaxcdc": repMaxCDC(t, 64, 1000), "repmaxcdc_one_chunk": repMaxCDC(t, 1<<20, 0),
	} {
		for _, size := range []int{0, 1, 63, 4096, 4097, len(data)} {
			want := lengths(t, f, data[:size])
			for how, r := range map[string]io.Reader{
				"whole":         bytes.NewReader(data[:size]),
				"half":          iotest.HalfReader(bytes.NewReader(data[:size])),
				"one_byte":      iotest.OneByteReader(bytes.NewReader(data[:size])),
				"data_with_eof": iotest.DataErrReader(bytes.NewReader(data[:size])),
			} {
				if got := read(t, f, r, data[:size]); !slices.Equal(got, want) {
					t.Errorf("%s, %d bytes, read %s: %d chunks, in memory %d, or other ones", name, size, how, len(got), len(want))
				}
			}
		}
	}
}

// TestReader_fails: what was read before an error may be half a chunk, and is not
// returned as one.
func TestReader_fails(t *testing.T) {
	broken := errors.New("broken")
	r := chunk.NewReader(io.MultiReader(bytes.NewReader(random(8, 3000)), iotest.ErrReader(broken)), fastCDC(t, 1<<10, 0))
	for range 2 {
		if c, err := r.Next(); !errors.Is(err, broken) || c != nil {
			t.Errorf("%d bytes, %v; want the reader's error", len(c), err)
		}
	}
}

func TestParameters(t *testing.T) {
	for _, average := range []int{-1, 0, 512, 1000, 16 << 20} {
		if _, err := chunk.NewFastCDC(average, 0); err == nil {
			t.Errorf("an average of %d: no error", average)
		}
	}
	for _, p := range [][2]int{{63, 0}, {-1, 0}, {64, -1}, {1 << 40, 0}, {64, 1 << 40}} {
		if _, err := chunk.NewRepMaxCDC(p[0], p[1]); err == nil {
			t.Errorf("a minimum of %d and a horizon of %d: no error", p[0], p[1])
		}
	}
	for _, average := range []int{chunk.MinFastCDCAverage, chunk.DefaultFastCDCAverage, chunk.MaxFastCDCAverage} {
		if f := fastCDC(t, average, 7); f.AverageBytes() != average || f.Seed() != 7 || f.MinBytes() != average/4 || f.MaxBytes() != 4*average {
			t.Errorf("FastCDC of %d: %d, seed %d, %d to %d", average, f.AverageBytes(), f.Seed(), f.MinBytes(), f.MaxBytes())
		}
	}
	if f := repMaxCDC(t, 64, 9); f.MinBytes() != 64 || f.MaxBytes() != 127 || f.HorizonBytes() != 9 {
		t.Errorf("RepMaxCDC: %d to %d, %d", f.MinBytes(), f.MaxBytes(), f.HorizonBytes())
	}
}
