package blob

import (
	"context"
	"os"
	"time"

	"github.com/mettle-build/mettle/elan/digest"
)

// What follows are abilities that only a store on the local disk has. They are
// found by type assertion, and let a worker in the same process build input
// roots and take outputs without copying a byte.

// LinkMode is how a linked file may be used. A file's mode belongs to its
// inode, so a store keeps one inode for each mode.
type LinkMode uint8

// The modes of linked files. None is writable.
const (
	LinkRegular    LinkMode = iota // 0444
	LinkExecutable                 // 0555
)

// Linker is a Store whose blobs are files that can be hard-linked.
type Linker interface {
	// Link makes dst, which must not exist, a file with the bytes of d: a
	// hard link to the store's own file where that is possible, and otherwise
	// (another file system, too many links) a copy. The file must not be
	// written to, nor its mode be changed. Linking starts the blob's lifetime
	// anew. Where d is not in the store, the error wraps ErrNotFound.
	Link(ctx context.Context, d digest.Digest, dst string, mode LinkMode) error
}

// Adopter is a Store that can take over a file.
type Adopter interface {
	// Adopt computes the digest of the regular file f and makes its bytes a
	// blob, without a copy where that is safe: f is on the store's file system
	// and has one name. After that f is read-only and belongs to the store;
	// its old name may remain and must not be written through. The caller
	// guarantees that nobody has f open for writing, and closes f.
	Adopt(ctx context.Context, fn digest.Function, f *os.File) (digest.Digest, error)
}

// SpaceAdopter is an Adopter that can do so in a digest.Space.
type SpaceAdopter interface {
	// AdoptIn is Adopt for a blob in that space. What it returns is in it too.
	AdoptIn(ctx context.Context, space digest.Space, fn digest.Function, f *os.File) (digest.Digest, error)
}

// Auditor is a Linker that can tell that a file it linked was tampered with.
type Auditor interface {
	// Audit compares what can be seen from outside (mode, owner, size and
	// modification time) of the linked file of d in the given mode with what
	// Link left. Where they differ, or did since the time linked, which is
	// before Link was called, it returns an error that wraps ErrCorrupt, after
	// it withdrew the file, so that nobody reads wrong bytes; the blob goes with
	// it unless the store has it elsewhere. Where the file is not there any
	// more, the error wraps ErrNotFound.
	Audit(ctx context.Context, d digest.Digest, mode LinkMode, linked time.Time) error
}
