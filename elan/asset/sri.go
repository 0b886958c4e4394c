package asset

import (
	"crypto/sha1" //nolint:gosec // where a client names nothing better
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"

	"github.com/zeebo/blake3"

	"github.com/mettle-build/mettle/elan/digest"
)

// checksum is one of what checksum.sri names: an algorithm and a raw hash.
// It is comparable.
type checksum struct {
	alg string
	raw string
}

// maxChecksums bounds those in one request.
const maxChecksums = 64

// algorithm is a hash that checksum.sri may name.
type algorithm struct {
	new  func() hash.Hash
	size int
	fn   digest.Function // the same hash as a digest function
	weak bool
}

//nolint:gochecknoglobals // an immutable table
var algorithms = map[string]algorithm{
	"sha256": {new: sha256.New, size: sha256.Size, fn: digest.SHA256},
	"sha384": {new: sha512.New384, size: sha512.Size384, fn: digest.SHA384},
	"sha512": {new: sha512.New, size: sha512.Size, fn: digest.SHA512},
	// These are not in the specification of SRI. Bazel sends them where a
	// repository rule gives nothing else.
	"blake3": {new: func() hash.Hash { return blake3.New() }, size: 32, fn: digest.BLAKE3},
	"sha1":   {new: sha1.New, size: sha1.Size, fn: digest.SHA1, weak: true},
}

// checksums are what a file's hash must be one of. They are sorted, each is there
// once. None means that any file will do.
type checksums []checksum

// parseSRI reads the value of checksum.sri: algorithm and hash, joined by a dash
// and separated by white space, each with options after a question mark, which
// mean nothing so far. Hashes are in base64, also in the variants without padding
// and for URLs; hexadecimal digits are taken too, since the length tells them
// apart. Algorithms that are not known are passed over, as the specification of
// SRI says, unless nothing else is left, and SHA-1 counts only where nothing
// better is there. The errors wrap ErrInvalid.
func parseSRI(value string) (checksums, error) {
	fields := strings.Fields(value)
	if len(fields) == 0 || len(fields) > maxChecksums {
		return nil, fmt.Errorf("%w: checksum.sri has %d checksums, want 1 to %d", ErrInvalid, len(fields), maxChecksums)
	}
	var strong, weak checksums
	for _, field := range fields {
		name, text, ok := strings.Cut(field, "-")
		if !ok {
			return nil, fmt.Errorf("%w: checksum.sri %.100q, want an algorithm such as sha256, a dash, and a hash", ErrInvalid, field)
		}
		alg, ok := algorithms[name]
		if !ok {
			continue
		}
		text, _, _ = strings.Cut(text, "?")
		raw, ok := decodeHash(text, alg.size)
		if !ok {
			return nil, fmt.Errorf("%w: checksum.sri %.200q, want %d bytes in base64 after the dash", ErrInvalid, field, alg.size)
		}
		if alg.weak {
			weak = append(weak, checksum{name, raw})
		} else {
			strong = append(strong, checksum{name, raw})
		}
	}
	if len(strong) == 0 {
		strong = weak
	}
	if len(strong) == 0 {
		return nil, fmt.Errorf("%w: checksum.sri %.200q has no algorithm that is known here: sha256, sha384, sha512, blake3 or sha1", ErrInvalid, value)
	}
	slices.SortFunc(strong, func(a, b checksum) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(strong), nil
}

// decodeHash reads a hash of size bytes in any of the spellings.
func decodeHash(text string, size int) (string, bool) {
	if len(text) == hex.EncodedLen(size) {
		raw, err := hex.DecodeString(text)
		return string(raw), err == nil
	}
	text = strings.TrimRight(text, "=")
	if len(text) != base64.RawStdEncoding.EncodedLen(size) {
		return "", false
	}
	text = strings.NewReplacer("-", "+", "_", "/").Replace(text)
	raw, err := base64.RawStdEncoding.Strict().DecodeString(text)
	return string(raw), err == nil
}

// String is c as SRI writes it.
func (c checksum) String() string {
	return c.alg + "-" + base64.StdEncoding.EncodeToString([]byte(c.raw))
}

// String is cs in the one spelling of many that makes part of keys.
func (cs checksums) String() string {
	parts := make([]string, len(cs))
	for i, c := range cs {
		parts[i] = c.String()
	}
	return strings.Join(parts, " ")
}

// hashes computes the checksums of what is written to it, for the algorithms that
// were asked for.
type hashes map[string]hash.Hash

// newHashes computes what is needed to compare with cs.
func newHashes(cs checksums) hashes {
	h := hashes{}
	for _, c := range cs {
		if h[c.alg] == nil {
			h[c.alg] = algorithms[c.alg].new()
		}
	}
	return h
}

// Write implements io.Writer.
func (h hashes) Write(p []byte) (int, error) {
	for _, x := range h {
		x.Write(p)
	}
	return len(p), nil
}

var _ io.Writer = hashes{}

// check returns the checksum of cs that the bytes have. One is enough: whoever
// lists several means that any of them will do. No checksums match anything.
func (h hashes) check(cs checksums) (checksum, error) {
	for _, c := range cs {
		if string(h[c.alg].Sum(nil)) == c.raw {
			return c, nil
		}
	}
	if len(cs) == 0 {
		return checksum{}, nil
	}
	var got []string
	for alg, x := range h {
		got = append(got, checksum{alg, string(x.Sum(nil))}.String())
	}
	slices.Sort(got)
	return checksum{}, failed(Aborted, "the checksum is %s, want %.500s", strings.Join(got, " "), cs)
}

// checksumOf is d's hash as a checksum, if there is an algorithm for it.
func checksumOf(d digest.Digest) (checksum, bool) {
	for name, alg := range algorithms {
		if alg.fn == d.Function() && !alg.weak {
			raw, err := hex.DecodeString(d.Hash())
			return checksum{name, string(raw)}, err == nil
		}
	}
	return checksum{}, false
}
