package digest

import (
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"hash"
	"math/bits"
)

// SHA256TREE (remote_execution.proto, DigestFunction) is a binary Merkle tree
// over chunks of 1024 bytes. Of each node the left half is as large as a power
// of two can be and leave something on the right. A chunk is hashed by SHA-256,
// and two hashes are joined by one run of its block cipher from another initial
// state, whose result is not added to that state.
//
// Both are done by crypto/sha256, which uses what the processor has for it. The
// block cipher alone is had by giving a hash the initial state, a block, and
// subtracting the initial state from what comes out.

const (
	chunkBytes = 1024
	// treeParallelBytes is the part of a Write that a goroutine of its own is
	// worth: it takes some 50 µs to hash, and handing it over some 1 µs.
	treeParallelBytes = 64 << 10
)

// tree is a hash.Hash of SHA256TREE. Its state is the hashes of the whole
// subtrees so far, at most one of each height, and the chunk that is incomplete.
type tree struct {
	joiner
	// chunks counts the complete ones. Bit k of it says that there is a subtree
	// of 2^k chunks; subtrees has their hashes, the highest first.
	chunks   uint64
	subtrees [][sha256.Size]byte
	partial  hash.Hash // of the incomplete chunk; nil before the first
	n        int       // its bytes, below chunkBytes
}

func newTree() *tree { return &tree{} }

func (t *tree) Size() int      { return sha256.Size }
func (t *tree) BlockSize() int { return chunkBytes }

func (t *tree) Reset() {
	t.chunks, t.subtrees, t.n = 0, t.subtrees[:0], 0
	if t.partial != nil {
		t.partial.Reset()
	}
}

// Clone implements hash.Cloner.
func (t *tree) Clone() (hash.Cloner, error) {
	c := &tree{chunks: t.chunks, n: t.n, subtrees: append([][sha256.Size]byte(nil), t.subtrees...)}
	if t.n > 0 {
		partial, err := t.partial.(hash.Cloner).Clone()
		if err != nil {
			return nil, err //nolint:wrapcheck // the standard library's, which has none
		}
		c.partial = partial
	}
	return c, nil
}

// Write hashes as many chunks at once as make a subtree that the count of those
// before it allows.
func (t *tree) Write(p []byte) (int, error) {
	total := len(p)
	if t.n > 0 {
		n := min(chunkBytes-t.n, len(p))
		t.writePartial(p[:n])
		p = p[n:]
		if t.n == chunkBytes {
			var sum [sha256.Size]byte
			t.partial.Sum(sum[:0])
			t.partial.Reset()
			t.n = 0
			t.push(sum, 1)
		}
	}
	for len(p) >= chunkBytes {
		chunks := uint64(1) << (bits.Len(uint(len(p)/chunkBytes)) - 1) //nolint:gosec // not negative
		if t.chunks > 0 {
			chunks = min(chunks, t.chunks&-t.chunks)
		}
		n := chunks * chunkBytes
		t.push(t.subtree(p[:n]), chunks)
		p = p[n:]
	}
	if len(p) > 0 {
		t.writePartial(p)
	}
	return total, nil
}

func (t *tree) writePartial(p []byte) {
	if t.partial == nil {
		t.partial = sha256.New()
	}
	t.partial.Write(p)
	t.n += len(p)
}

// push adds the hash of a subtree of so many chunks, a power of two, and joins
// what is of the same height.
func (t *tree) push(sum [sha256.Size]byte, chunks uint64) {
	for h := chunks; t.chunks&h != 0; h <<= 1 {
		top := len(t.subtrees) - 1
		sum = t.join(&t.subtrees[top], &sum)
		t.subtrees = t.subtrees[:top]
	}
	t.chunks += chunks
	t.subtrees = append(t.subtrees, sum)
}

// Sum appends the hash of what was written so far, and changes no state.
func (t *tree) Sum(b []byte) []byte {
	var sum [sha256.Size]byte
	rest := t.subtrees
	switch {
	case t.n > 0:
		t.partial.Sum(sum[:0])
	case len(rest) > 0:
		sum, rest = rest[len(rest)-1], rest[:len(rest)-1]
	default:
		sum = sha256.Sum256(nil)
	}
	for i := len(rest) - 1; i >= 0; i-- {
		sum = t.join(&rest[i], &sum)
	}
	return append(b, sum[:]...)
}

// joiner joins two hashes. Its buffers are here because what is passed to an
// interface would be allocated at every call otherwise.
type joiner struct {
	h     hash.Hash
	block [2 * sha256.Size]byte
	state []byte
}

// treeState is the initial state of joins: the fractional parts of the square
// roots of the primes from 23 to 53.
//
//nolint:gochecknoglobals // an immutable table
var treeState = [8]uint32{0xcbbb9d5d, 0x629a292a, 0x9159015a, 0x152fecd8, 0x67332667, 0x8eb44a87, 0xdb0c2e0d, 0x47b5481d}

// The marshalled state of a crypto/sha256 hash is a magic of four bytes, the
// state as eight words, a block, and the number of bytes so far, of which none
// are waiting for their block here.
const (
	marshalledMagic = "sha\x03"
	marshalledLen   = len(marshalledMagic) + sha256.Size + sha256.BlockSize + 8
)

// initial is the marshalled treeState.
//
//nolint:gochecknoglobals // an immutable table
var initial = func() []byte {
	b := append(make([]byte, 0, marshalledLen), marshalledMagic...)
	for _, w := range treeState {
		b = binary.BigEndian.AppendUint32(b, w)
	}
	return b[:marshalledLen]
}()

func (j *joiner) join(left, right *[sha256.Size]byte) (sum [sha256.Size]byte) {
	if j.h == nil {
		j.h, j.state = sha256.New(), make([]byte, 0, marshalledLen)
	}
	copy(j.block[:], left[:])
	copy(j.block[sha256.Size:], right[:])
	// Neither fails: the state is one that the package wrote (a test compares),
	// and every hash of the package has one to give.
	_ = j.h.(encoding.BinaryUnmarshaler).UnmarshalBinary(initial)
	j.h.Write(j.block[:])
	j.state, _ = j.h.(encoding.BinaryAppender).AppendBinary(j.state[:0])
	words := j.state[len(marshalledMagic):]
	for i, w := range treeState {
		binary.BigEndian.PutUint32(sum[4*i:], binary.BigEndian.Uint32(words[4*i:])-w)
	}
	return sum
}

// subtree is the hash of p, of a power of two of chunks.
func (j *joiner) subtree(p []byte) (sum [sha256.Size]byte) {
	if len(p) == chunkBytes {
		return sha256.Sum256(p)
	}
	half := len(p) / 2
	if half >= treeParallelBytes {
		return j.subtreeAtOnce(p[:half], p[half:])
	}
	left, right := j.subtree(p[:half]), j.subtree(p[half:])
	return j.join(&left, &right)
}

// subtreeAtOnce is subtree of the two halves, hashed at the same time.
func (j *joiner) subtreeAtOnce(p, q []byte) [sha256.Size]byte {
	var right [sha256.Size]byte
	done := make(chan struct{})
	go func() {
		defer close(done)
		right = new(joiner).subtree(q)
	}()
	left := j.subtree(p)
	<-done
	return j.join(&left, &right)
}
