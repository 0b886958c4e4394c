package tree

import (
	"encoding/binary"
	"strings"
	"unicode/utf8"

	"github.com/mettle-build/mettle/elan/digest"
)

// The fields of a Directory and of what is in it, each with its type in one byte.
const (
	dirFiles, dirDirectories, dirSymlinks = 1<<3 | 2, 2<<3 | 2, 3<<3 | 2
	nodeName, nodeDigest                  = 1<<3 | 2, 2<<3 | 2 // of a symlink, the second is the target
	fileExecutable                        = 4 << 3
	digestHash, digestSize                = 1<<3 | 2, 2 << 3
)

// scan reads an encoded Directory as Unmarshal and Validate do, in one pass and
// without making messages of what is in it: a GetTree of ten thousand
// Directories needs no more of them than which are below. It returns the digests
// of those. Where ok is false it was not sure that all is right, or met a field
// that is rare (node_properties), and generated code has to look.
func scan(fn digest.Function, data []byte) (children []digest.Digest, ok bool) {
	var lists [3][]string // the names of files, directories and symlinks
	s := string(data)     // so that its parts are strings without more ado
	for len(s) > 0 {
		tag := s[0]
		if tag != dirFiles && tag != dirDirectories && tag != dirSymlinks {
			return nil, false
		}
		var value string
		if value, s, ok = lengthDelimited(s[1:]); !ok {
			return nil, false
		}
		n, ok := scanNode(value, tag == dirFiles)
		if !ok {
			return nil, false
		}
		list := &lists[tag>>3-1]
		prev := ""
		if len(*list) > 0 {
			prev = (*list)[len(*list)-1]
		}
		if validateName("", prev, n.name) != nil {
			return nil, false
		}
		*list = append(*list, n.name)
		if tag == dirSymlinks {
			if n.second == "" || strings.IndexByte(n.second, 0) >= 0 || !utf8.ValidString(n.second) {
				return nil, false
			}
			continue
		}
		d, ok := scanDigest(fn, n.second, tag == dirDirectories)
		if !ok {
			return nil, false
		}
		if tag == dirDirectories {
			children = append(children, d)
		}
	}
	return children, disjoint(lists)
}

// node is an entry of a Directory: its name, and its digest, encoded, or its target.
type node struct {
	name, second string
	hasSecond    bool
}

func scanNode(s string, file bool) (n node, ok bool) {
	for len(s) > 0 {
		switch tag := s[0]; {
		case tag == nodeName && n.name == "":
			if n.name, s, ok = lengthDelimited(s[1:]); !ok {
				return n, false
			}
		case tag == nodeDigest && !n.hasSecond:
			n.hasSecond = true
			if n.second, s, ok = lengthDelimited(s[1:]); !ok {
				return n, false
			}
		case tag == fileExecutable && file && len(s) > 1 && s[1] <= 1:
			s = s[2:]
		default:
			return n, false
		}
	}
	return n, n.hasSecond
}

// scanDigest reads a Digest. One that is to be kept has a hash of its own, or it
// would keep all of the Directory that it stands in.
func scanDigest(fn digest.Function, s string, keep bool) (d digest.Digest, ok bool) {
	var hash string
	var size uint64
	if len(s) == 0 || s[0] != digestHash {
		return d, false
	}
	if hash, s, ok = lengthDelimited(s[1:]); !ok {
		return d, false
	}
	if len(s) > 0 {
		if s[0] != digestSize {
			return d, false
		}
		var n int
		if size, n = uvarint(s[1:]); n <= 0 || n+1 != len(s) {
			return d, false
		}
	}
	if keep {
		hash = strings.Clone(hash)
	}
	d, err := digest.New(fn, hash, int64(size)) //nolint:gosec // the encoding of negative numbers, which New refuses
	return d, err == nil
}

// lengthDelimited splits s into the value that its length begins and the rest.
func lengthDelimited(s string) (value, rest string, ok bool) {
	n, k := uvarint(s)
	if k <= 0 || n > uint64(len(s)-k) {
		return "", "", false
	}
	return s[k : k+int(n)], s[k+int(n):], true //nolint:gosec // at most len(s)
}

// uvarint is binary.Uvarint of a string.
func uvarint(s string) (uint64, int) {
	if len(s) > 0 && s[0] < 0x80 {
		return uint64(s[0]), 1
	}
	return binary.Uvarint([]byte(s[:min(len(s), binary.MaxVarintLen64)]))
}

// disjoint reports whether no two of the sorted lists share a name.
func disjoint(lists [3][]string) bool {
	for i, a := range lists {
		for _, b := range lists[i+1:] {
			for x, y := a, b; len(x) > 0 && len(y) > 0; {
				switch {
				case x[0] == y[0]:
					return false
				case x[0] < y[0]:
					x = x[1:]
				default:
					y = y[1:]
				}
			}
		}
	}
	return true
}
