package digest_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"math/bits"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/elan/digest"
)

// repeating is the sequence of the specification's vectors.
func repeating(n int) []byte {
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(i % 251)
	}
	return data
}

// TestSHA256Tree_vectors: those of the specification.
func TestSHA256Tree_vectors(t *testing.T) {
	f, err := os.Open("testdata/sha256tree_test_vectors.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := 0
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		var size int
		var want string
		if _, err := fmt.Sscan(line, &size, &want); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if got := digest.Of(digest.SHA256TREE, repeating(size)).Hash(); got != want {
			t.Errorf("%d bytes: %s, want %s", size, got, want)
		}
		n++
	}
	if n < 18 {
		t.Errorf("only %d vectors were found", n)
	}
	for _, size := range []int{0, 1, 55, 56, 1023, 1024} {
		if got, want := digest.Of(digest.SHA256TREE, repeating(size)).Hash(), digest.Of(digest.SHA256, repeating(size)).Hash(); got != want {
			t.Errorf("%d bytes: %s, want the SHA-256, %s", size, got, want)
		}
	}
}

// TestSHA256Tree_portions: however the bytes come, also in portions that are
// hashed at the same time, the hash is that of the definition.
func TestSHA256Tree_portions(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	all := repeating(3<<20 + 777)
	h := digest.SHA256TREE.New(0)
	for _, size := range []int{1025, 2047, 4096, 65536, 131072, 131073, 262144, 1 << 20, 1<<20 + 1, 3 << 20, len(all)} {
		want := bySpec(all[:size])
		for _, most := range []int{1, 100, 1024, 5000, 70000, 300000, size} {
			if most == 1 && size > 5000 {
				continue
			}
			h.Reset()
			for rest := all[:size]; len(rest) > 0; {
				n := min(1+rnd.IntN(most), len(rest))
				if w, err := h.Write(rest[:n]); w != n || err != nil {
					t.Fatalf("Write of %d bytes: %d, %v", n, w, err)
				}
				rest = rest[n:]
			}
			if got := h.Sum([]byte{1}); !bytes.Equal(got[1:], want[:]) || got[0] != 1 {
				t.Errorf("%d bytes in portions of up to %d: %x, want %x", size, most, got[1:], want)
			}
		}
	}
}

// FuzzSHA256Tree: what comes in two portions, with a Sum and a Clone between
// them, has the hash of the definition.
func FuzzSHA256Tree(f *testing.F) {
	f.Add(uint32(1025), uint32(1))
	f.Add(uint32(5120), uint32(1024))
	f.Add(uint32(300000), uint32(4096))
	f.Fuzz(func(t *testing.T, size, first uint32) {
		data := repeating(int(size % (1 << 19)))
		first = min(first, uint32(len(data)))
		h := digest.SHA256TREE.New(0)
		h.Write(data[:first])
		if got, want := h.Sum(nil), bySpec(data[:first]); !bytes.Equal(got, want[:]) {
			t.Errorf("%d bytes: %x, want %x", first, got, want)
		}
		c, err := h.(hash.Cloner).Clone()
		if err != nil {
			t.Fatal(err)
		}
		want := bySpec(data)
		for _, h := range []hash.Hash{h, c} {
			h.Write(data[first:])
			if got := h.Sum(nil); !bytes.Equal(got, want[:]) {
				t.Errorf("%d bytes after %d: %x, want %x", len(data), first, got, want)
			}
		}
	})
}

// TestGITSHA1: the hashes are those that Git gives to the same files.
func TestGITSHA1(t *testing.T) {
	for _, c := range []struct{ data, want string }{
		{"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"},
		{"abc", "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f"},
		{"hello world\n", "3b18e512dba79e4c8300dd08aeb37f8e728b8dad"},
	} {
		d := digest.Of(digest.GITSHA1, []byte(c.data))
		if d.Hash() != c.want {
			t.Errorf("%q: %s, want %s", c.data, d.Hash(), c.want)
		}
		h := digest.GITSHA1.New(int64(len(c.data)))
		h.Write([]byte("something else"))
		h.Reset()
		clone, err := h.(hash.Cloner).Clone()
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range []hash.Hash{h, clone} {
			h.Write([]byte(c.data))
			if got := hex.EncodeToString(h.Sum(nil)); got != c.want {
				t.Errorf("%q after Reset: %s, want %s", c.data, got, c.want)
			}
		}
	}
}

// bySpec is SHA256TREE word for word as remote_execution.proto has it.
func bySpec(data []byte) [32]byte {
	if len(data) <= 1024 {
		return sha256.Sum256(data)
	}
	m := 1 << (bits.Len(uint(len(data)-1)) - 1)
	left, right := bySpec(data[:m]), bySpec(data[m:])
	h := [8]uint32{0xcbbb9d5d, 0x629a292a, 0x9159015a, 0x152fecd8, 0x67332667, 0x8eb44a87, 0xdb0c2e0d, 0x47b5481d}
	words := cipher(h, append(left[:], right[:]...))
	var sum [32]byte
	for i, w := range words {
		binary.BigEndian.PutUint32(sum[4*i:], w)
	}
	return sum
}

// cipher is the block cipher of SHA-256 (FIPS 180-4, 6.2.2), without the addition
// that follows it.
func cipher(h [8]uint32, block []byte) [8]uint32 {
	rotr := func(x uint32, n int) uint32 { return bits.RotateLeft32(x, -n) }
	var w [64]uint32
	for i := range 16 {
		w[i] = binary.BigEndian.Uint32(block[4*i:])
	}
	for i := 16; i < 64; i++ {
		s0 := rotr(w[i-15], 7) ^ rotr(w[i-15], 18) ^ w[i-15]>>3
		s1 := rotr(w[i-2], 17) ^ rotr(w[i-2], 19) ^ w[i-2]>>10
		w[i] = w[i-16] + s0 + w[i-7] + s1
	}
	for i, k := range roundConstants() {
		t1 := h[7] + (rotr(h[4], 6) ^ rotr(h[4], 11) ^ rotr(h[4], 25)) + (h[4]&h[5] ^ ^h[4]&h[6]) + k + w[i]
		t2 := (rotr(h[0], 2) ^ rotr(h[0], 13) ^ rotr(h[0], 22)) + (h[0]&h[1] ^ h[0]&h[2] ^ h[1]&h[2])
		h = [8]uint32{t1 + t2, h[0], h[1], h[2], h[3] + t1, h[4], h[5], h[6]}
	}
	return h
}

// roundConstants are the first 32 bits of the fractional parts of the cube roots
// of the first 64 primes, in integers: the cube root of p·2^96.
func roundConstants() (ks [64]uint32) {
	n := 0
	for p := uint64(2); n < len(ks); p++ {
		prime := true
		for q := uint64(2); q*q <= p; q++ {
			prime = prime && p%q != 0
		}
		if !prime {
			continue
		}
		// The largest r with r³ <= p·2^96; r has 35 bits at most, r³ 105.
		var r uint64
		for bit := uint64(1) << 35; bit > 0; bit >>= 1 {
			c := r | bit
			hi, lo := bits.Mul64(c, c) // below 2^72: hi is small
			hi2, lo2 := bits.Mul64(lo, c)
			hi2 += hi * c
			if limit := p << 32; hi2 < limit || hi2 == limit && lo2 == 0 {
				r = c
			}
		}
		ks[n] = uint32(r)
		n++
	}
	return ks
}

func BenchmarkHash(b *testing.B) {
	for _, fn := range []digest.Function{digest.SHA256, digest.SHA256TREE, digest.BLAKE3, digest.SHA1, digest.GITSHA1} {
		for _, size := range []int{1 << 10, 16 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("%s/%dKiB", fn, size>>10), func(b *testing.B) {
				data := repeating(size)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					digest.Of(fn, data)
				}
			})
		}
	}
}
