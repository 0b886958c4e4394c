// Package inventory takes stock of a store: it lists what is there, tells of
// single blobs, adds up, verifies, and takes things out. The Inventory is the
// contract; Local is one over a store in this process, and elan/client has
// another, over gRPC to a server, which serves it with a Local (elan/rpc). So
// the tools of elan work on either.
//
// It neither writes blobs nor reads them for anybody, and it prints nothing.
package inventory

import (
	"context"
	"errors"
	"iter"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// ErrUnsupported: the store has no such ability, as one behind the Remote
// Execution API alone has none.
var ErrUnsupported = errors.New("not supported by this store")

// Lister enumerates.
type Lister interface {
	// Blobs yields the blobs that fulfil f, in no order that means anything. An
	// error ends the enumeration. No lifetime starts anew.
	Blobs(ctx context.Context, f Filter) iter.Seq2[blob.Info, error]
	// Entries yields the entries of the ActionCache that fulfil f, as Blobs does.
	Entries(ctx context.Context, f Filter) iter.Seq2[blob.EntryInfo, error]
}

// Statter tells of single blobs and entries. No lifetime starts anew.
type Statter interface {
	// Stat tells of those of ds that are there, in the order of ds.
	Stat(ctx context.Context, ds []digest.Digest) ([]blob.Info, error)
	// StatEntries tells of those of ks that are there, in the order of ks.
	StatEntries(ctx context.Context, ks []blob.EntryKey) ([]blob.EntryInfo, error)
}

// Remover takes out what a person wants to have gone, against all lifetimes.
type Remover interface {
	// Remove removes ds, and returns those that were not there. After an error
	// some may be gone.
	Remove(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error)
	// RemoveEntries removes ks, as Remove does.
	RemoveEntries(ctx context.Context, ks []blob.EntryKey) ([]blob.EntryKey, error)
}

// Surveyor looks at everything.
type Surveyor interface {
	// Usage adds up what is there.
	Usage(ctx context.Context) (Usage, error)
	// Verify reads blobs and compares them with their digests. It yields what it
	// finds, and how far it is: after each finding, about once a second, and at
	// the end. An error ends it.
	Verify(ctx context.Context, o VerifyOptions) iter.Seq2[Progress, error]
}

// Inventory is all that one can know of a store from outside. The methods are
// safe for concurrent use; their errors wrap ErrUnsupported where the store has
// not that ability, and blob's classes.
type Inventory interface {
	Lister
	Statter
	Remover
	Surveyor
}

// Filter says what is listed: what fulfils all that is set. The zero Filter lists
// everything.
type Filter struct {
	Function digest.Function // zero: all
	// MinBytes and MaxBytes bound the size of the blob, or of the entry's value.
	// A MaxBytes of 0 is no bound.
	MinBytes, MaxBytes int64
	// UsedBefore and UsedSince bound the last use; one that is not known
	// fulfils neither. Zero: no bound.
	UsedBefore, UsedSince time.Time
	// Instance, if it is not nil, is the one whose entries are listed. It says
	// nothing of blobs.
	Instance *string
}

// Blob reports whether i fulfils f.
func (f Filter) Blob(i blob.Info) bool {
	return f.matches(i.Digest.Function(), i.Digest.Size(), i.LastUse)
}

// Entry reports whether i fulfils f.
func (f Filter) Entry(i blob.EntryInfo) bool {
	return f.matches(i.Key.Action.Function(), i.Bytes, i.LastUse) && (f.Instance == nil || *f.Instance == i.Key.Instance)
}

func (f Filter) matches(fn digest.Function, size int64, lastUse time.Time) bool {
	switch {
	case f.Function != 0 && fn != f.Function,
		size < f.MinBytes,
		f.MaxBytes > 0 && size > f.MaxBytes,
		!f.UsedBefore.IsZero() && (lastUse.IsZero() || !lastUse.Before(f.UsedBefore)),
		!f.UsedSince.IsZero() && (lastUse.IsZero() || lastUse.Before(f.UsedSince)):
		return false
	}
	return true
}
