package digest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// A Space keeps blobs apart that have the same digest: in one store there may be
// a blob in each of several spaces, and who asks for it in one of them learns
// nothing of the others. A server that isolates its instances gives each a space
// (elan/blob/instances); everywhere else there is only the zero Space, at no cost.
//
// A Space is comparable, and safe for concurrent use.
type Space struct{ tag string } // spaceLen lower-case hexadecimal digits, or none

// spaceLen is the length of a Space's tag: half of a SHA-256, of which nobody finds
// two names with the same.
const spaceLen = sha256.Size

// SpaceOf is the Space of a name, which may be any string.
func SpaceOf(name string) Space {
	sum := sha256.Sum256([]byte(name))
	return Space{hex.EncodeToString(sum[:spaceLen/2])}
}

// ParseSpace reads what String writes. The errors wrap ErrInvalid.
func ParseSpace(s string) (Space, error) {
	if s != "" && len(s) != spaceLen {
		return Space{}, fmt.Errorf("%w: space %.100q, want %d hexadecimal digits", ErrInvalid, s, spaceLen)
	}
	for i := range len(s) {
		if !isHexDigit[s[i]] {
			return Space{}, fmt.Errorf("%w: space %q has %q at position %d, want lower-case hexadecimal digits", ErrInvalid, s, s[i], i)
		}
	}
	return Space{s}, nil
}

// String is for names in stores: lower-case hexadecimal digits, empty for the
// zero Space.
func (s Space) String() string { return s.tag }

// IsZero reports whether s is the Space in which blobs are that nobody keeps
// apart.
func (s Space) IsZero() bool { return s.tag == "" }

// In is the digest of the same blob in space s. The empty blob is everywhere, and
// in no space.
func (d Digest) In(s Space) Digest {
	if d.size == 0 {
		return d
	}
	d.hash = d.Hash() + s.tag
	return d
}

// Plain is d in the zero Space: what names the blob to clients, and what bytes
// are compared with.
func (d Digest) Plain() Digest {
	d.hash = d.Hash()
	return d
}

// Space is the Space that d is in.
func (d Digest) Space() Space { return Space{d.hash[d.fn.HexLen():]} }
