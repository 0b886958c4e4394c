//go:build linux

// Package inputroot makes the files of an action's input root from Directory
// messages and blobs, and removes them again.
//
// Where the store keeps blobs as files, inputs are hard links to them: nothing
// is copied. An input must then be nothing that an action can change, for itself
// only or for others, which is what LinkPolicy is about. Where such a store has part
// of its blobs elsewhere (blob.Fetcher), it is asked for all that is missing at once:
// for the Directories level by level, then for the files. Two equal files of one
// input root are two inodes all the same: a rename of one link of an inode onto
// another does nothing, by POSIX. Where the store is elsewhere, blobs are
// fetched some at a time and copied.
//
// What repeats is not made again. A slot's Shelf keeps whole input roots after their
// commands, looks what these have changed in them, and puts it right; the next Build
// takes the one that is most like what it is to make, leaves each subtree with the
// same Directory digest as it is, and makes and removes only what differs. The
// directories belong to the command and are writable, as they are in a new root.
// README.md has the reasons and the figures.
//
// Each slot of a worker calls Build before a command and Remove after it. What
// the Directory messages say was validated when it was read, by elan/tree; so
// names are joined to paths without a further look, and no name of an input root
// leads out of it.
package inputroot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tree"
)

// LinkPolicy says how inputs may share inodes with the store.
type LinkPolicy uint8

// The policies.
const (
	// Copy shares nothing. It is for commands that can write and chmod any
	// file: those that run as root.
	Copy LinkPolicy = iota
	// Link is for commands that run as another user than the store's owner,
	// and so can neither write to its files nor change their modes.
	Link
	// LinkAndAudit is for commands that run as the store's owner. They can
	// change its files by chmod first; Audit finds that out afterwards.
	LinkAndAudit
)

// Owner is whom the directories of input roots belong to, by number. The zero
// Owner is the user of the worker.
type Owner struct {
	Set      bool
	UID, GID int
}

// Options are those of New.
type Options struct {
	// Store has the blobs.
	Store blob.Store
	// Policy applies where Store is a blob.Linker. LinkAndAudit without a
	// blob.Auditor is Copy.
	Policy LinkPolicy
	// MaxDepth bounds the directories within each other; 0 means 256.
	MaxDepth int
	// MaxEntries bounds the files, directories and symlinks of one input root,
	// counted as they stand on disk; 0 means 1,000,000, at which a link each
	// takes ten seconds.
	MaxEntries int
	// MaxDirectoryBytes bounds one Directory message; 0 means 16 MiB, some
	// 150,000 files.
	MaxDirectoryBytes int64
	// MaxFetches bounds the blobs that one Build reads at a time from a store
	// that is not on the local disk; 0 means 16.
	MaxFetches int
	// CacheEntries bounds the decoded Directories that are kept, by the entries
	// in them; 0 means 100,000, some 20 MB.
	CacheEntries int
}

// Builder builds input roots. It is safe for concurrent use: all slots of a
// worker share one, with its cache of decoded Directories.
type Builder struct {
	o       Options
	linker  blob.Linker      // nil: copy
	auditor blob.Auditor     // nil: no audits
	fetcher blob.Fetcher     // nil: Store is all on the local disk, or none of it
	trees   blob.TreeFetcher // nil: fetcher is none
	local   bool             // Store is on the local disk
	cache   *cache
}

// New checks the options and returns a Builder, which needs no closing.
func New(o Options) (*Builder, error) {
	if o.Store == nil {
		return nil, errors.New("input root: Options need a Store")
	}
	if o.Policy > LinkAndAudit {
		return nil, fmt.Errorf("input root: unknown link policy %d", o.Policy)
	}
	if o.MaxDepth < 0 || o.MaxEntries < 0 || o.MaxDirectoryBytes < 0 || o.MaxFetches < 0 || o.CacheEntries < 0 {
		return nil, errors.New("input root: negative limit")
	}
	o.MaxDepth = cmp.Or(o.MaxDepth, 256)
	o.MaxEntries = cmp.Or(o.MaxEntries, 1_000_000)
	o.MaxDirectoryBytes = cmp.Or(o.MaxDirectoryBytes, 16<<20)
	o.MaxFetches = cmp.Or(o.MaxFetches, 16)
	o.CacheEntries = cmp.Or(o.CacheEntries, 100_000)
	b := &Builder{o: o, cache: newCache(o.CacheEntries)}
	linker, isLinker := blob.As[blob.Linker](o.Store)
	auditor, isAuditor := blob.As[blob.Auditor](o.Store)
	b.local = isLinker
	if isLinker {
		b.fetcher, _ = blob.As[blob.Fetcher](o.Store)
		b.trees, _ = blob.As[blob.TreeFetcher](o.Store)
	}
	switch {
	case o.Policy == Link && isLinker:
		b.linker = linker
	case o.Policy == LinkAndAudit && isLinker && isAuditor:
		b.linker, b.auditor = linker, auditor
	}
	return b, nil
}

// Request is one input root to build.
type Request struct {
	// Dir is the absolute path of the root, which must not exist.
	Dir string
	// Digest is that of the root's Directory.
	Digest digest.Digest
	// Owner is whom the directories belong to. Files that are linked belong to
	// the store's owner, and so do copies, except those with a mode of their
	// own.
	Owner Owner
	// Shelf, if not nil, has input roots and directories to be used again. It is the
	// one whose Remove takes Dir away, before the next Build with it.
	Shelf *Shelf
	// Directories are made where the input root does not have them, with
	// their parents: the working directory, and the parents of outputs. They
	// are slash-separated, relative to the root, and clean.
	Directories []string
}

// Root is an input root that was built.
type Root struct {
	// Entries counts its files, directories and symlinks, and Made those of them that
	// were made for it: the others were there, in a root of the Shelf.
	Entries, Made int

	auditor blob.Auditor
	linked  []link
	kept    *kept     // nil: linked has all of them
	begun   time.Time // before the first of them, or the last look at those that were there
}

type link struct {
	digest digest.Digest
	mode   blob.LinkMode
}

// Build makes an input root. Where blobs are missing, the error is a
// *blob.MissingError that names all of them, the Directories and the files; below
// a missing Directory it can't look. Errors about malformed Directories wrap
// tree.ErrInvalid or blob.ErrMalformed. When it fails, part of the root may be
// there: Remove it.
func (b *Builder) Build(ctx context.Context, req Request) (*Root, error) {
	root, err := b.build(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("input root %s: %w", req.Digest, err)
	}
	return root, nil
}

func (b *Builder) build(ctx context.Context, req Request) (*Root, error) {
	t, err := b.load(ctx, req.Digest)
	if err != nil {
		return nil, err
	}
	w := &work{b: b, t: t, owner: req.Owner, shelf: req.Shelf, root: &Root{auditor: b.auditor, begun: time.Now()}, plan: plan{t: t}}
	node, base := w.prepare(&req)
	w.root.Entries, w.root.Made = t.entries, w.plan.made()
	if err := b.haveFiles(ctx, &w.plan); err != nil {
		return nil, err
	}
	if err := w.begin(&req, base); err != nil {
		return nil, err
	}
	if err := w.do(ctx); err != nil {
		return nil, classify(err)
	}
	if err := w.copies(ctx); err != nil {
		return nil, classify(err)
	}
	if len(w.missing) > 0 {
		return nil, &blob.MissingError{Digests: unique(w.missing)}
	}
	if w.keep != nil {
		if err := w.seal(req.Dir, node); err != nil {
			return nil, err
		}
	}
	if err := w.directories(req.Dir, req.Directories); err != nil {
		return nil, classify(err)
	}
	return w.root, w.times()
}

// classify tells a name that the file system can't have, which is the client's
// fault, from other trouble.
func classify(err error) error {
	if errors.Is(err, unix.ENAMETOOLONG) {
		return fmt.Errorf("%w: %w", tree.ErrInvalid, err)
	}
	return err
}

func unique(ds []digest.Digest) []digest.Digest {
	seen := make(map[digest.Digest]struct{}, len(ds))
	return slices.DeleteFunc(ds, func(d digest.Digest) bool {
		_, again := seen[d]
		seen[d] = struct{}{}
		return again
	})
}
