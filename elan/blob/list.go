package blob

import (
	"context"
	"iter"
	"time"

	"github.com/mettle-build/mettle/elan/digest"
)

// What follows are abilities for those who look after a store: to see what is in
// it, and to take something out. They are found by type assertion; a store
// behind the Remote Execution API has neither, because the API has no such call.

// Info is what a Lister tells of a blob.
type Info struct {
	Digest digest.Digest
	// StoredBytes is what the blob takes in the store; it can be less than the
	// digest's size where it is compressed or shares chunks with others.
	StoredBytes int64
	// LastUse is the start of its lifetime as the store recorded it, which may
	// be somewhat earlier than the truth. Zero where the store does not know.
	LastUse time.Time
}

// Lister enumerates what is in a store. It starts no lifetime anew.
type Lister interface {
	// Blobs yields each blob once, in no order that means anything. One that
	// comes or goes meanwhile may be left out. An error ends the enumeration.
	Blobs(ctx context.Context) iter.Seq2[Info, error]
}

// Remover takes a blob out before its time, and against the lifetime contract:
// for a person who knows why, not for a program.
type Remover interface {
	// Remove removes d. Where it is not there the error wraps ErrNotFound.
	Remove(ctx context.Context, d digest.Digest) error
}

// EntryInfo is what an EntryLister tells of an entry.
type EntryInfo struct {
	Key EntryKey
	// Bytes is the size of the value.
	Bytes   int64
	LastUse time.Time // as in Info
}

// EntryLister enumerates the entries of an ActionCache, as Lister does blobs.
type EntryLister interface {
	EntryInfos(ctx context.Context) iter.Seq2[EntryInfo, error]
}

// Statter tells of one blob what a Lister tells of all.
type Statter interface {
	// Stat starts no lifetime anew. Where d is not in the store, the error wraps
	// ErrNotFound.
	Stat(ctx context.Context, d digest.Digest) (Info, error)
}

// EntryStatter tells of one entry what an EntryLister tells of all.
type EntryStatter interface {
	// StatEntry starts no lifetime anew. Where there is none, the error wraps
	// ErrNotFound.
	StatEntry(ctx context.Context, k EntryKey) (EntryInfo, error)
}

// Checker looks whether what it keeps is what it was given.
type Checker interface {
	// Check reads the store's copy of d, all of it, and compares it with d. It
	// starts no lifetime anew. A copy that is corrupt is taken away, so that the
	// blob is missing from then on, and the error wraps ErrCorrupt. Where d is
	// not in the store, it wraps ErrNotFound.
	Check(ctx context.Context, d digest.Digest) error
}

// As finds an ability A of a store, or of the first of the stores inside that
// has it: a decorator that must know what is done by it has the ability itself,
// and the others have Unwrap.
func As[A any](s any) (A, bool) {
	for {
		if a, ok := s.(A); ok {
			return a, true
		}
		u, ok := s.(interface{ Unwrap() Store })
		if !ok {
			var none A
			return none, false
		}
		s = u.Unwrap()
	}
}
