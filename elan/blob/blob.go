// Package blob is the contract between those who need blobs and those who keep
// them: one interface a verb, summed into Store, and the classes of errors.
//
// A blob is immutable and named by its digest. The stores are in the folders
// beside this file (mem, file, ...); every one of them passes the suite of
// blobtest. Bytes from outside enter through Receive, the one place where they
// are verified, so that a store may trust what it is given. What changes under
// its name, an ActionCache entry, is not a blob: see Entries.
//
// All methods of all implementations are safe for concurrent use. The context
// bounds the call itself; of Open and Create it bounds also the reading and the
// writing that follow. The empty blob is in every store without having been
// put there.
//
// A digest is the whole key of a blob, its digest.Space included: what is in one
// space is in no other. A store that can't keep spaces apart answers for digests
// in any but the zero one with an error that wraps errors.ErrUnsupported.
package blob

import (
	"context"
	"errors"
	"io"

	"github.com/mettle-build/mettle/elan/digest"
)

// The classes of errors. Every error of a store wraps one of them, or one of
// context's, or is trouble of the store's own that the caller can only pass on.
var (
	// ErrNotFound: the store was asked and the blob or the entry is not there.
	// It is never concluded from any other failure.
	ErrNotFound = errors.New("not found")
	// ErrCorrupt: the bytes are not those that the digest names. It is
	// digest.ErrMismatch under the name by which the stores' callers know it.
	ErrCorrupt = digest.ErrMismatch
	// ErrTooLarge: the blob is over a limit that was configured, and will
	// never be taken.
	ErrTooLarge = errors.New("too large")
	// ErrFull: there is no room now that may be used without breaking the
	// lifetime contract, or the disk is full. Later there may be.
	ErrFull = errors.New("store is full")
	// ErrUnavailable: the store can't answer now; the same call may succeed later.
	ErrUnavailable = errors.New("store is unavailable")
)

// Finder tells which blobs are there.
type Finder interface {
	// FindMissing returns those of ds that are not in the store, each once, in
	// the order of their first mention. What it does not return is there, and
	// its lifetime starts anew. Where the store can't tell of one, it fails
	// as a whole.
	FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error)
}

// Opener reads blobs.
type Opener interface {
	// Open returns the bytes of a blob from offset, in bytes, to its end. The
	// caller closes the reader. An offset outside 0 to d.Size() is an error of
	// the caller. Opening a blob starts its lifetime anew. Where d is not in
	// the store, the error wraps ErrNotFound.
	Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error)
}

// Creator takes blobs in. It does not verify: only Receive, ReceiveBytes and
// code that has itself computed the digest of the bytes call it.
type Creator interface {
	// Create begins the blob d. A blob that is already there may be created
	// again, at no harm. Errors wrap ErrFull or ErrTooLarge where they apply.
	Create(ctx context.Context, d digest.Digest) (Writer, error)
}

// A Writer takes the bytes of one blob, which becomes visible, whole, when
// Commit returns nil, and not before. It is used by one goroutine at a time.
type Writer interface {
	io.Writer
	// Commit makes the blob visible. It is an error if fewer or more bytes
	// than the digest's size were written. It is called at most once.
	Commit() error
	// Close frees what the Writer holds. Without a Commit before it that
	// returned nil, nothing of the blob remains. It may be called twice.
	Close() error
}

// Store is a content-addressable storage.
type Store interface {
	Finder
	Opener
	Creator
}

// Entries keeps the small mutable records of an ActionCache: values under keys
// that say nothing about them.
type Entries interface {
	// Entry returns the value of k, which the caller owns, and starts its
	// lifetime anew. Where there is none the error wraps ErrNotFound.
	Entry(ctx context.Context, k EntryKey) ([]byte, error)
	// PutEntry sets the value of k, replacing an older one at once and whole.
	// It does not keep value.
	PutEntry(ctx context.Context, k EntryKey, value []byte) error
	// DeleteEntry removes k. It is no error if there is none.
	DeleteEntry(ctx context.Context, k EntryKey) error
}

// EntryKey names an entry: the digest of an Action within an instance. It is
// comparable.
type EntryKey struct {
	Instance string
	Action   digest.Digest
}
