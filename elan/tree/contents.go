package tree

import (
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/digest"
)

// Contents is what a Tree refers to, with repetitions where it repeats itself.
type Contents struct {
	// Root is the digest of the root directory. Only Check computes it.
	Root digest.Digest
	// Files are the files' digests.
	Files []digest.Digest
	// Directories are those of the directories below the root. As blobs of
	// their own they need not be in a store, because the Tree holds them.
	Directories []digest.Digest
}

// Read lists what the Tree whose encoding is data refers to. Each Directory in
// it is validated; the errors wrap ErrInvalid. It trusts that the Tree holds
// all the directories that it refers to, see Check.
func Read(fn digest.Function, data []byte) (Contents, error) {
	var c Contents
	roots := 0
	err := eachDirectory(data, func(num protowire.Number, raw []byte) error {
		if num == rootField {
			roots++
		}
		return c.add(fn, raw)
	})
	// An absent root reads as an empty one, as absent messages do.
	if err == nil && roots > 1 {
		err = fmt.Errorf("%w: the Tree has %d root directories, want one", ErrInvalid, roots)
	}
	if err != nil {
		return Contents{}, err
	}
	return c, nil
}

// Check is Read, and makes sure that the Tree holds every directory that it
// refers to. It hashes all of them. A Tree is immutable, so that who has checked
// one need only Read it later.
func Check(fn digest.Function, data []byte) (Contents, error) {
	c, err := Read(fn, data)
	if err != nil {
		return Contents{}, err
	}
	c.Root = digest.Empty(fn)
	held := map[digest.Digest]struct{}{}
	// It cannot fail where Read did not.
	err = eachDirectory(data, func(num protowire.Number, raw []byte) error {
		d := digest.Of(fn, raw)
		held[d] = struct{}{}
		if num == rootField {
			c.Root = d
		}
		return nil
	})
	if err != nil {
		return Contents{}, err
	}
	for _, d := range c.Directories {
		if _, ok := held[d]; !ok && !d.IsEmpty() {
			return Contents{}, fmt.Errorf("%w: the Tree refers to directory %s and does not hold it", ErrInvalid, d)
		}
	}
	return c, nil
}

// add notes what the Directory with the encoding raw refers to.
func (c *Contents) add(fn digest.Function, raw []byte) error {
	dir := &repb.Directory{}
	if err := proto.Unmarshal(raw, dir); err != nil {
		return fmt.Errorf("%w: the Tree holds what is no Directory: %w", ErrInvalid, err)
	}
	if err := Validate(fn, dir); err != nil {
		return err
	}
	for _, f := range dir.Files {
		d, err := digest.FromProto(fn, f.Digest)
		if err != nil {
			return fmt.Errorf("%w: file %q: %w", ErrInvalid, f.Name, err)
		}
		c.Files = append(c.Files, d)
	}
	for _, s := range dir.Directories {
		d, err := digest.FromProto(fn, s.Digest)
		if err != nil {
			return fmt.Errorf("%w: directory %q: %w", ErrInvalid, s.Name, err)
		}
		c.Directories = append(c.Directories, d)
	}
	return nil
}

// The fields of Tree.
const (
	rootField     protowire.Number = 1
	childrenField protowire.Number = 2
)

// eachDirectory calls visit with the encodings of the root and the children of
// the Tree whose encoding is data. The bytes themselves are needed, because they
// are what a directory's digest is of; and a Directory at a time takes less
// memory than a whole Tree.
func eachDirectory(data []byte, visit func(num protowire.Number, raw []byte) error) error {
	for len(data) > 0 {
		num, typ, n := protowire.ConsumeTag(data)
		if n < 0 {
			return fmt.Errorf("%w: the Tree is malformed: %w", ErrInvalid, protowire.ParseError(n))
		}
		data = data[n:]
		if typ != protowire.BytesType || (num != rootField && num != childrenField) {
			if n = protowire.ConsumeFieldValue(num, typ, data); n < 0 {
				return fmt.Errorf("%w: the Tree is malformed: %w", ErrInvalid, protowire.ParseError(n))
			}
			data = data[n:]
			continue
		}
		raw, n := protowire.ConsumeBytes(data)
		if n < 0 {
			return fmt.Errorf("%w: the Tree is malformed: %w", ErrInvalid, protowire.ParseError(n))
		}
		data = data[n:]
		if err := visit(num, raw); err != nil {
			return err
		}
	}
	return nil
}

// Expand is Check for who wants the directories of the Tree themselves: each by
// its digest, the root among them.
func Expand(fn digest.Function, data []byte) (root digest.Digest, dirs map[digest.Digest]*repb.Directory, err error) {
	c, err := Check(fn, data)
	if err != nil {
		return digest.Digest{}, nil, err
	}
	dirs = map[digest.Digest]*repb.Directory{}
	// It cannot fail where Check did not.
	err = eachDirectory(data, func(_ protowire.Number, raw []byte) error {
		dir := &repb.Directory{}
		if err := proto.Unmarshal(raw, dir); err != nil {
			return fmt.Errorf("%w: the Tree holds what is no Directory: %w", ErrInvalid, err)
		}
		dirs[digest.Of(fn, raw)] = dir
		return nil
	})
	return c.Root, dirs, err
}
