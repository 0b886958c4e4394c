// Package resource parses and formats the names of ByteStream resources. Those of
// blobs have two forms, each with or without a compressor:
//
//	{instance/}blobs/{function/}{hash}/{size}
//	{instance/}compressed-blobs/{compressor}/{function/}{hash}/{size}
//	{instance/}uploads/{uuid}/blobs/{function/}{hash}/{size}{/metadata}
//	{instance/}uploads/{uuid}/compressed-blobs/{compressor}/{function/}{hash}/{size}{/metadata}
//
// Log streams have names of their own, see LogStreamName.
//
// elan/rpc parses what clients send, and elan/client formats what servers get.
// The package knows every compressor of the REAPI; whether the server speaks it
// is for elan/rpc to say.
package resource

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/digest"
)

// ErrInvalid is wrapped by the errors about malformed resource names: the fault
// is in what the client sent.
var ErrInvalid = errors.New("invalid resource name")

// MaxLen bounds a resource name, in bytes. A long name has 512-bit hashes, a
// UUID, and an instance name that somebody typed; names are map keys in the
// server, so they may not be of any length.
const MaxLen = 4096

// The forms, as the errors show them.
const (
	readForm  = "{instance/}blobs/{function/}{hash}/{size}"
	writeForm = "{instance/}uploads/{uuid}/blobs/{function/}{hash}/{size}{/metadata}"
)

// A Name is a parsed resource name. It is comparable, and immutable by custom.
// Its strings share memory with the string that was parsed.
type Name struct {
	// Instance is the instance name, empty or of any number of segments.
	Instance string
	// UUID tells uploads of one blob apart. It is empty in a name for reading
	// and never in a name for writing.
	UUID string
	// Metadata is what follows the size in a name for writing, without the
	// slash before it. It means nothing to us.
	Metadata string
	// Digest is that of the blob, uncompressed.
	Digest digest.Digest
	// Compressor is how the bytes travel.
	Compressor repb.Compressor_Value
}

// ParseRead parses the name in a ReadRequest. It allocates nothing where the
// name is good. The errors wrap ErrInvalid, and digest.ErrInvalid where the
// digest is what is wrong, and say what was expected.
func ParseRead(s string) (Name, error) {
	if len(s) > MaxLen {
		return Name{}, tooLong(s)
	}
	for start := 0; ; {
		seg, next := segment(s, start)
		if seg == "blobs" || seg == "compressed-blobs" {
			n := Name{Instance: instance(s, start)}
			rest, err := n.parseBlob(s, start)
			if err == nil && rest != "" {
				err = fmt.Errorf("%w: %q goes on after the size, want %s", ErrInvalid, s, readForm)
			}
			if err != nil {
				return Name{}, err
			}
			return n, nil
		}
		if next < 0 || keyword(seg) {
			return Name{}, fmt.Errorf("%w: %q, want %s", ErrInvalid, s, readForm)
		}
		start = next
	}
}

// ParseWrite parses the name in a WriteRequest or a QueryWriteStatusRequest, as
// ParseRead does.
func ParseWrite(s string) (Name, error) {
	if len(s) > MaxLen {
		return Name{}, tooLong(s)
	}
	for start := 0; ; {
		seg, next := segment(s, start)
		if seg == "uploads" && next >= 0 {
			n := Name{Instance: instance(s, start)}
			n.UUID, next = segment(s, next)
			if n.UUID == "" || next < 0 {
				return Name{}, fmt.Errorf("%w: %q has no UUID after uploads, want %s", ErrInvalid, s, writeForm)
			}
			rest, err := n.parseBlob(s, next)
			if err != nil {
				return Name{}, err
			}
			n.Metadata = rest
			return n, nil
		}
		if next < 0 || keyword(seg) {
			return Name{}, fmt.Errorf("%w: %q, want %s", ErrInvalid, s, writeForm)
		}
		start = next
	}
}

// parseBlob reads what stands from the segment blobs or compressed-blobs at
// start to the size, and returns what follows.
func (n *Name) parseBlob(s string, start int) (rest string, err error) {
	kind, next := segment(s, start)
	var seg string
	if kind == "compressed-blobs" && next >= 0 {
		seg, next = segment(s, next)
		if n.Compressor, err = compressor(seg); err != nil {
			return "", err
		}
	} else if kind != "blobs" {
		return "", fmt.Errorf("%w: %q has %q where blobs or compressed-blobs is due", ErrInvalid, s, kind)
	}
	if next < 0 {
		return "", fmt.Errorf("%w: %q ends before the hash, want %s", ErrInvalid, s, readForm)
	}
	hash, next := segment(s, next)
	fn, ok := digest.FunctionNamed(hash)
	if ok && next >= 0 {
		hash, next = segment(s, next)
	} else if fn, ok = digest.FunctionOfLen(len(hash)); !ok {
		return "", fmt.Errorf("%w: %q has %q where a digest function or a hash is due; the functions here are %v",
			ErrInvalid, s, hash, digest.Functions())
	}
	if next < 0 {
		return "", fmt.Errorf("%w: %q ends before the size, want %s", ErrInvalid, s, readForm)
	}
	seg, next = segment(s, next)
	size, err := digest.ParseSize(seg)
	if err != nil {
		return "", fmt.Errorf("%w: %q: %w", ErrInvalid, s, err)
	}
	if n.Digest, err = digest.New(fn, hash, size); err != nil {
		return "", fmt.Errorf("%w: %q: %w", ErrInvalid, s, err)
	}
	if next < 0 {
		return "", nil
	}
	return s[next:], nil
}

// String formats n: the form for writing where it has a UUID, and the one for
// reading where it has not.
func (n Name) String() string {
	size := len("compressed-blobs//uploads//////") + len(n.Instance) + len(n.UUID) + len(n.Metadata) + len(n.Digest.Hash()) + 40
	b := make([]byte, 0, size)
	if n.Instance != "" {
		b = append(append(b, n.Instance...), '/')
	}
	if n.UUID != "" {
		b = append(append(append(b, "uploads/"...), n.UUID...), '/')
	}
	if n.Compressor == repb.Compressor_IDENTITY {
		b = append(b, "blobs/"...)
	} else {
		b = append(append(append(b, "compressed-blobs/"...), compressorName(n.Compressor)...), '/')
	}
	if fn := n.Digest.Function(); fn.Named() {
		b = append(append(b, fn.String()...), '/')
	}
	b = append(append(b, n.Digest.Hash()...), '/')
	b = strconv.AppendInt(b, n.Digest.Size(), 10)
	if n.UUID != "" && n.Metadata != "" {
		b = append(append(b, '/'), n.Metadata...)
	}
	return string(b)
}

// segment is the path segment of s at start, and where the next one begins, or
// -1 where there is none.
func segment(s string, start int) (seg string, next int) {
	if i := strings.IndexByte(s[start:], '/'); i >= 0 {
		return s[start : start+i], start + i + 1
	}
	return s[start:], -1
}

// instance is what stands in s before the segment at start, without its slash.
func instance(s string, start int) string {
	if start == 0 {
		return ""
	}
	return s[:start-1]
}

// MaxInstanceLen bounds an instance name, in bytes.
const MaxInstanceLen = 1024

// CheckInstance checks an instance name, which may be empty: no segment of it is
// one of the words by which resource names are parsed (remote_execution.proto,
// ContentAddressableStorage), no byte a control character, and it has at most
// MaxInstanceLen bytes. The errors wrap ErrInvalid.
func CheckInstance(name string) error {
	if name == "" {
		return nil
	}
	if len(name) > MaxInstanceLen {
		return fmt.Errorf("%w: the instance name has %d bytes and begins with %.100q, at most %d are allowed", ErrInvalid, len(name), name, MaxInstanceLen)
	}
	for i := range len(name) {
		if name[i] < ' ' || name[i] == 0x7f {
			return fmt.Errorf("%w: the instance name %q has a control character at position %d", ErrInvalid, name, i)
		}
	}
	for start := 0; start >= 0; {
		var seg string
		if seg, start = segment(name, start); keyword(seg) {
			return fmt.Errorf("%w: the instance name %q has the segment %q, which means something else in resource names", ErrInvalid, name, seg)
		}
	}
	return nil
}

// keyword reports whether seg may not be a segment of an instance name.
func keyword(seg string) bool {
	switch seg {
	case "blobs", "uploads", "actions", "actionResults", "operations", "capabilities", "compressed-blobs":
		return true
	}
	return false
}

// compressor is the inverse of compressorName. Identity has a form of its own,
// and is not a compressor in a name.
func compressor(name string) (repb.Compressor_Value, error) {
	for _, c := range []repb.Compressor_Value{repb.Compressor_ZSTD, repb.Compressor_DEFLATE, repb.Compressor_BROTLI} {
		if compressorName(c) == name {
			return c, nil
		}
	}
	return 0, fmt.Errorf("%w: unknown compressor %.100q, want zstd, deflate or brotli", ErrInvalid, name)
}

func compressorName(c repb.Compressor_Value) string {
	switch c {
	case repb.Compressor_ZSTD:
		return "zstd"
	case repb.Compressor_DEFLATE:
		return "deflate"
	case repb.Compressor_BROTLI:
		return "brotli"
	}
	return "identity"
}

func tooLong(s string) error {
	return fmt.Errorf("%w: it has %d bytes and begins with %.100q, at most %d are allowed", ErrInvalid, len(s), s, MaxLen)
}
