package bucket

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// The objects' names, after the prefix:
//
//	cas/FUNCTION/HASH-SIZE            a blob
//	cas/FUNCTION/HASH-SIZE-SPACE      a blob in a digest.Space
//	cas/zstd/FUNCTION/...             the same of a store with Options.Containers
//	ac/INSTANCE/FUNCTION/HASH-SIZE    an entry: those of an instance are one folder
//
// INSTANCE is the name itself where that is made of letters, digits, - and _
// only, and at most 100 of them; "~" for the empty name; "~" and the name in
// base64 (that of URLs, without padding) for other names of at most 190 bytes; and
// "~~" and the name's SHA-256 in hexadecimal for longer ones.

// maxPrefix keeps the longest name, with a SHA-512, within the 1,024 bytes that
// buckets allow.
const maxPrefix = 512

// CleanPrefix makes of a URL's path the prefix of the objects' names: without
// the slash in front, and with one at the end unless it is empty.
func CleanPrefix(path string) (string, error) {
	prefix := strings.Trim(path, "/")
	if prefix == "" {
		return "", nil
	}
	if len(prefix) > maxPrefix {
		return "", fmt.Errorf("the prefix has %d bytes, at most %d are possible", len(prefix), maxPrefix)
	}
	for part := range strings.SplitSeq(prefix, "/") {
		if part == "" || part == "." || part == ".." || strings.ContainsFunc(part, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\uFFFD' }) {
			return "", fmt.Errorf("the prefix %q has a part %q", prefix, part)
		}
	}
	return prefix + "/", nil
}

// folder is where the blobs are. Containers are in another one, below, so that
// the bucket's rule is for both, and no blob is ever taken for a container.
func (s *Store) folder() string {
	if s.o.Containers {
		return "cas/zstd/"
	}
	return "cas/"
}

func (s *Store) blobName(d digest.Digest) string {
	var buf [256]byte
	b := append(buf[:0], s.prefix...)
	b = append(b, s.folder()...)
	return string(appendDigest(b, d))
}

func (s *Store) entryName(k blob.EntryKey) string {
	var buf [384]byte
	b := append(buf[:0], s.prefix...)
	b = append(b, "ac/"...)
	b = appendInstance(b, k.Instance)
	b = append(b, '/')
	return string(appendDigest(b, k.Action))
}

// maxEncoded is the length of the longest instance name that an object's name
// tells: servers that keep objects as files (MinIO, Versity's gateway) take no more
// than 255 bytes between slashes, which is what base64 makes of 190.
const maxEncoded = 190

func appendInstance(b []byte, instance string) []byte {
	switch {
	case plain(instance):
		return append(b, instance...)
	case len(instance) <= maxEncoded:
		return base64.RawURLEncoding.AppendEncode(append(b, '~'), []byte(instance))
	}
	sum := sha256.Sum256([]byte(instance))
	return hex.AppendEncode(append(b, "~~"...), sum[:])
}

// parseInstance is the reverse of appendInstance. It can't be for long names.
func parseInstance(part string) (instance string, ok bool) {
	if plain(part) {
		return part, true
	}
	encoded, ok := strings.CutPrefix(part, "~")
	if !ok {
		return "", false
	}
	raw, err := base64.RawURLEncoding.DecodeString(encoded)
	return string(raw), err == nil
}

// parseDigest is the reverse of appendDigest.
func parseDigest(name string) (digest.Digest, bool) {
	function, rest, ok := strings.Cut(name, "/")
	hash, rest, sized := strings.Cut(rest, "-")
	size, tag, spaced := strings.Cut(rest, "-")
	n, err := digest.ParseSize(size)
	if !ok || !sized || err != nil {
		return digest.Digest{}, false
	}
	for _, fn := range digest.Functions() {
		if fn.String() == function {
			d, err := digest.New(fn, hash, n)
			if err != nil || !spaced {
				return d, err == nil
			}
			space, err := digest.ParseSpace(tag)
			return d.In(space), err == nil && !space.IsZero()
		}
	}
	return digest.Digest{}, false
}

func appendDigest(b []byte, d digest.Digest) []byte {
	b = append(b, d.Function().String()...)
	b = append(b, '/')
	b = append(b, d.Hash()...)
	b = append(b, '-')
	b = strconv.AppendInt(b, d.Size(), 10)
	if space := d.Space(); !space.IsZero() {
		b = append(append(b, '-'), space.String()...)
	}
	return b
}

// plain reports whether an instance's name may stand in an object's name.
func plain(instance string) bool {
	if instance == "" || len(instance) > 100 {
		return false
	}
	for i := range len(instance) {
		c := instance[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return true
}
