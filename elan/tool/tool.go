// Package tool is what the commands of elan do with a store, wherever it is:
// read digests as people write them, describe what a blob means, fetch blobs and
// whole trees of files, and put files and folders in. It prints to the Writers
// that it is given, and asks nobody anything. What takes stock of a store
// (listing, removing, verifying) is elan/inventory. Elan's main calls it, which
// has the flags and opens the stores.
package tool

import (
	"context"
	"fmt"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Results looks up results of actions: those that a server serves, or the
// entries of a store.
type Results interface {
	// Get returns the result of an action. Where there is none, the error wraps
	// blob.ErrNotFound.
	Get(ctx context.Context, k blob.EntryKey) (*repb.ActionResult, error)
}

// ParseDigest reads a digest as people and other tools write it: HASH/SIZE, and
// with '-' or ':' for the slash; before it, by one of the same signs, the name of
// the digest function, which is needed where the length of the hash does not
// tell it; and before all that "blobs/", as in the messages of builds. After it
// may come '@' and a space, as in the listing of a store whose instances are kept
// apart. The errors wrap digest.ErrInvalid and say what would be right.
func ParseDigest(text string) (digest.Digest, error) {
	bad := func(why string) (digest.Digest, error) {
		return digest.Digest{}, fmt.Errorf("%w: %.200q %s; a digest is HASH/SIZE or FUNCTION:HASH/SIZE, as in sha256:%s/0",
			digest.ErrInvalid, text, why, digest.Empty(digest.SHA256).Hash())
	}
	s := strings.TrimPrefix(strings.TrimPrefix(strings.TrimSpace(text), "/"), "blobs/")
	if plain, tag, apart := strings.Cut(s, "@"); apart {
		space, err := digest.ParseSpace(tag)
		if err != nil {
			return digest.Digest{}, err //nolint:wrapcheck // it says what is wrong
		}
		d, err := ParseDigest(plain)
		if err != nil {
			return digest.Digest{}, err
		}
		return d.In(space), nil
	}
	parts := strings.Split(strings.Map(func(r rune) rune {
		if r == '-' || r == ':' {
			return '/'
		}
		return r
	}, s), "/")
	switch {
	case s == "":
		return bad("is empty")
	case len(parts) == 1:
		return bad("has no size")
	case len(parts) > 3:
		return bad("has too many parts")
	}
	size, hash := parts[len(parts)-1], strings.ToLower(parts[len(parts)-2])
	n, err := digest.ParseSize(size)
	if err != nil {
		if _, isFunction := digest.FunctionNamed(strings.ToLower(parts[0])); len(parts) == 2 && isFunction {
			return bad("has no size")
		}
		return bad(fmt.Sprintf("has %.50q for a size in bytes", size))
	}
	if len(parts) == 3 {
		fn, ok := digest.FunctionNamed(strings.ToLower(parts[0]))
		if !ok {
			return bad(fmt.Sprintf("names a digest function %.50q, of which there are %v", parts[0], digest.Functions()))
		}
		return digest.New(fn, hash, n)
	}
	fn, ok := digest.FunctionOfLen(len(hash))
	if !ok {
		return bad(fmt.Sprintf("has a hash of %d hexadecimal digits, which belongs to no digest function", len(hash)))
	}
	return digest.New(fn, hash, n)
}

// ParseDigests is ParseDigest for each of texts.
func ParseDigests(texts []string) ([]digest.Digest, error) {
	ds := make([]digest.Digest, 0, len(texts))
	for _, text := range texts {
		d, err := ParseDigest(text)
		if err != nil {
			return nil, err
		}
		ds = append(ds, d)
	}
	return ds, nil
}
