package file

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// The key of a record in the packs: its kind, the digest function, the size as a
// uvarint, the hash, the digest's space where it is not the zero one, and of an
// entry of another than the unnamed instance the SHA-256 of its name.
const (
	keyBlob        = 'b'
	keySpacedBlob  = 'B'
	keyEntry       = 'e'
	keySpacedEntry = 'E'

	spaceBytes = 16
)

// keyBuffer has room for any key.
type keyBuffer [2 + binary.MaxVarintLen64 + 64 + spaceBytes + sha256.Size]byte

// appendBlobKey appends the key of the blob d.
func appendBlobKey(b []byte, d digest.Digest) []byte { return appendKey(b, keyBlob, keySpacedBlob, d) }

// appendEntryKey appends the key of the entry k.
func appendEntryKey(b []byte, k blob.EntryKey) []byte {
	b = appendKey(b, keyEntry, keySpacedEntry, k.Action)
	if k.Instance == "" {
		return b
	}
	sum := sha256.Sum256([]byte(k.Instance))
	return append(b, sum[:]...)
}

func appendKey(b []byte, plain, spaced byte, d digest.Digest) []byte {
	space := d.Space()
	kind := plain
	if !space.IsZero() {
		kind = spaced
	}
	b = append(b, kind, byte(d.Function()))
	b = binary.AppendUvarint(b, uint64(d.Size())) //nolint:gosec // not negative
	b = appendHex(b, d.Hash())
	if kind == spaced {
		b = appendHex(b, space.String())
	}
	return b
}

// appendHex appends the bytes that lower-case hexadecimal digits are.
func appendHex(b []byte, digits string) []byte {
	for i := 0; i+1 < len(digits); i += 2 {
		b = append(b, nibble(digits[i])<<4|nibble(digits[i+1]))
	}
	return b
}

// nibble is the value of a digit: of '0' to '9' its lower half, and of 'a' to
// 'f', which have the bit 0x40, nine more than that.
func nibble(c byte) byte { return c&0xf + c>>6*9 }

// parseKey is the reverse of appendBlobKey and, but for the instance, of
// appendEntryKey.
func parseKey(key []byte) (d digest.Digest, entry, ok bool) {
	if len(key) < 2 {
		return d, false, false
	}
	kind, fn := key[0], digest.Function(key[1])
	size, n := binary.Uvarint(key[2:])
	if !fn.Valid() || n <= 0 || size > 1<<62 || len(key) < 2+n+fn.HexLen()/2 {
		return d, false, false
	}
	rest := key[2+n:]
	d, err := digest.New(fn, hex.EncodeToString(rest[:fn.HexLen()/2]), int64(size)) //nolint:gosec // not over 1<<62
	if err != nil {
		return d, false, false
	}
	rest = rest[fn.HexLen()/2:]
	entry = kind == keyEntry || kind == keySpacedEntry
	if kind == keySpacedBlob || kind == keySpacedEntry {
		if len(rest) < spaceBytes {
			return d, false, false
		}
		space, err := digest.ParseSpace(hex.EncodeToString(rest[:spaceBytes]))
		if err != nil {
			return d, false, false
		}
		d, rest = d.In(space), rest[spaceBytes:]
	}
	switch {
	case !entry && kind != keyBlob && kind != keySpacedBlob:
		return d, false, false
	case entry && len(rest) != 0 && len(rest) != sha256.Size, !entry && len(rest) != 0:
		return d, false, false
	}
	return d, entry, true
}
