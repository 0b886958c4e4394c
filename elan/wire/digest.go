package wire

import (
	"encoding/binary"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/encoding/protowire"
)

// Digest is a Digest message as it came, with nothing checked.
type Digest struct {
	Hash      string
	SizeBytes int64
}

// Proto is d as a message of the generated code.
func (d Digest) Proto() *repb.Digest { return &repb.Digest{Hash: d.Hash, SizeBytes: d.SizeBytes} }

// rawDigest is a Digest whose hash is not yet a string of its own.
type rawDigest struct {
	hash []byte
	size int64
}

// parseDigest reads a Digest message; ok is false for one that generated code has
// to look at.
func parseDigest(b []byte) (d rawDigest, ok bool) {
	for len(b) > 0 {
		switch b[0] {
		case bytesField1:
			d.hash, b, ok = lengthDelimited(b[1:])
			if !ok || !utf8.Valid(d.hash) {
				return d, false
			}
		case varintField2:
			v, n := binary.Uvarint(b[1:])
			if n <= 0 {
				return d, false
			}
			d.size, b = int64(v), b[1+n:] //nolint:gosec // the encoding of negative numbers
		default:
			return d, false
		}
	}
	return d, true
}

// lengthDelimited splits b into the value that its length begins and the rest.
func lengthDelimited(b []byte) (value, rest []byte, ok bool) {
	n, k := binary.Uvarint(b)
	if k <= 0 || n > uint64(len(b)-k) {
		return nil, nil, false
	}
	return b[k : k+int(n)], b[k+int(n):], true //nolint:gosec // at most len(b)
}

// hashesAtOnce is how many hashes share an allocation. Who keeps one of them keeps
// its neighbours, 4 KiB of them for SHA256.
const hashesAtOnce = 64

// digestList makes Digests of rawDigests.
type digestList struct {
	list []Digest
	text []byte            // the hashes that are not strings yet, one after the other
	ends [hashesAtOnce]int // of them in text
	n    int               // how many of ends there are
}

func (l *digestList) add(d rawDigest) {
	l.list = append(l.list, Digest{SizeBytes: d.size})
	l.text = append(l.text, d.hash...)
	l.ends[l.n] = len(l.text)
	if l.n++; l.n == hashesAtOnce {
		l.flush()
	}
}

// flush gives the last Digests of the list their hashes.
func (l *digestList) flush() {
	text, begin := string(l.text), 0
	last := l.list[len(l.list)-l.n:]
	for i, end := range l.ends[:l.n] {
		last[i].Hash = text[begin:end]
		begin = end
	}
	l.text, l.n = l.text[:0], 0
}

// sizeDigest is the length of d's encoding.
func sizeDigest(d Digest) int {
	n := 0
	if d.Hash != "" {
		n += 1 + protowire.SizeBytes(len(d.Hash))
	}
	if d.SizeBytes != 0 {
		n += 1 + protowire.SizeVarint(uint64(d.SizeBytes)) //nolint:gosec // the encoding of negative numbers
	}
	return n
}

// appendDigest appends d as the field with a tag, after which size, its length.
func appendDigest(b []byte, tag byte, d Digest, size int) []byte {
	b = append(b, tag)
	b = protowire.AppendVarint(b, uint64(size)) //nolint:gosec // a length
	if d.Hash != "" {
		b = append(b, bytesField1)
		b = protowire.AppendString(b, d.Hash)
	}
	if d.SizeBytes != 0 {
		b = append(b, varintField2)
		b = protowire.AppendVarint(b, uint64(d.SizeBytes)) //nolint:gosec // the encoding of negative numbers
	}
	return b
}

// digestsOf are the Digests of generated code; an absent one in a list reads as
// one of nothing.
func digestsOf(ds []*repb.Digest) []Digest {
	list := make([]Digest, len(ds))
	for i, d := range ds {
		list[i] = Digest{Hash: d.GetHash(), SizeBytes: d.GetSizeBytes()}
	}
	return list
}

// protosOf is the opposite of digestsOf.
func protosOf(ds []Digest) []*repb.Digest {
	list := make([]*repb.Digest, len(ds))
	for i, d := range ds {
		list[i] = d.Proto()
	}
	return list
}

// parseDigests reads a message whose field 2 is a list of Digests. Each other
// field goes to other, with its tag and with all that follows the tag, of which
// other returns the rest. Where ok is false, generated code has to look at it.
func parseDigests(b []byte, other func(tag byte, b []byte) (rest []byte, ok bool)) (_ []Digest, ok bool) {
	l := digestList{list: make([]Digest, 0, countField2(b))}
	for len(b) > 0 {
		tag := b[0]
		if tag != bytesField2 {
			if b, ok = other(tag, b[1:]); !ok {
				return nil, false
			}
			continue
		}
		var value []byte
		if value, b, ok = lengthDelimited(b[1:]); !ok {
			return nil, false
		}
		d, ok := parseDigest(value)
		if !ok {
			return nil, false
		}
		l.add(d)
	}
	l.flush()
	return l.list, true
}

// countField2 is how many fields 2 there are in a row, from the first on: all of
// them where a message is encoded as usual.
func countField2(b []byte) int {
	n := 0
	for len(b) > 0 {
		_, rest, ok := lengthDelimited(b[1:])
		switch {
		case !ok:
			return n
		case b[0] == bytesField2:
			n++
		case b[0] != bytesField1:
			return n
		}
		b = rest
	}
	return n
}

// parseText reads a string.
func parseText(b []byte) (s string, rest []byte, ok bool) {
	value, rest, ok := lengthDelimited(b)
	if !ok || !utf8.Valid(value) {
		return "", nil, false
	}
	return string(value), rest, true
}

// parseVarint reads a number.
func parseVarint(b []byte) (v uint64, rest []byte, ok bool) {
	v, n := binary.Uvarint(b)
	if n <= 0 {
		return 0, nil, false
	}
	return v, b[n:], true
}

// parseEnum reads a number that is an enum's, as generated code does.
func parseEnum[E ~int32](b []byte, to *E) (rest []byte, ok bool) {
	v, rest, ok := parseVarint(b)
	if ok {
		*to = E(v) //nolint:gosec // enums are cut to 32 bits
	}
	return rest, ok
}

// sizeDigests is the length of ds as fields of one-byte tags.
func sizeDigests(ds []Digest) int {
	n := 0
	for _, d := range ds {
		n += 1 + protowire.SizeBytes(sizeDigest(d))
	}
	return n
}

// appendDigests appends ds as fields with a tag.
func appendDigests(b []byte, tag byte, ds []Digest) []byte {
	for _, d := range ds {
		b = appendDigest(b, tag, d, sizeDigest(d))
	}
	return b
}

// validText reports whether ds can be sent: strings are UTF-8.
func validText(ds []Digest) bool {
	for _, d := range ds {
		if !utf8.ValidString(d.Hash) {
			return false
		}
	}
	return true
}
