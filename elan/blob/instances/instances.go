// Package instances keeps the blobs of instances apart in one store: each
// instance has a digest.Space, and a view of the store in which there is what was
// put there through that view, and nothing else.
//
// A server shares blobs among all its instances unless it is told not to. Who can
// ask for a blob by its hash can read it then, and who asks whether it is missing,
// or has an upload end early, learns that somebody has it. With instances kept
// apart, that holds within an instance only, at the cost of keeping what two of
// them have twice. The limit and the lifetimes of the store are those of all
// instances together, and who may use which instance is not for this package to say.
//
// The unnamed instance has a space as every other has. So a store that was shared
// before shows none of its old blobs, to anybody, and evicts them in time.
//
// The mains of elan and of mettle dual make a Stores, and hand its Of to elan/rpc,
// elan/action, mettle/api and mettle/worker, which call it for each request.
package instances

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Stores is a store, seen from each instance. It is safe for concurrent use, and
// keeps nothing of the instances, however many names clients think of.
type Stores struct {
	inner   blob.Store
	chunker blob.Chunker // nil where inner is none
	local   *local       // nil where inner has no files to link
	far     *far         // nil where inner has all of these files, or none
}

// local is the abilities of a store on the local disk. They come together.
type local struct {
	blob.Linker
	blob.SpaceAdopter
	blob.Auditor
}

// far is the abilities of a store of which a part only is on the local disk.
type far struct {
	blob.Fetcher
	blob.LateAdopter
	trees blob.TreeFetcher // nil: it is none
}

// New asks inner, which the caller closes, whether it keeps spaces apart. The
// error wraps errors.ErrUnsupported where it does not.
func New(ctx context.Context, inner blob.Store) (*Stores, error) {
	probe := digest.Of(digest.SHA256, []byte("are spaces kept apart?")).In(digest.SpaceOf("instances"))
	if _, err := inner.FindMissing(ctx, []digest.Digest{probe}); err != nil {
		return nil, fmt.Errorf("keep instances apart in this store: %w", err)
	}
	return Over(inner), nil
}

// Over is New for a store that is known to keep spaces apart, or to ask one that
// does: it asks nothing.
func Over(inner blob.Store) *Stores {
	s := &Stores{inner: inner}
	s.chunker, _ = blob.As[blob.Chunker](inner)
	l, links := blob.As[blob.Linker](inner)
	ad, adopts := blob.As[blob.SpaceAdopter](inner)
	au, audits := blob.As[blob.Auditor](inner)
	if links && adopts && audits {
		s.local = &local{l, ad, au}
		fe, fetches := blob.As[blob.Fetcher](inner)
		la, passes := blob.As[blob.LateAdopter](inner)
		if fetches && passes {
			s.far = &far{Fetcher: fe, LateAdopter: la}
			s.far.trees, _ = blob.As[blob.TreeFetcher](inner)
		}
	}
	return s
}

// Of is the store of an instance, which need not be closed. It is a
// blob.Linker, Adopter and Auditor if the inner store is, and then a blob.Fetcher,
// TreeFetcher and LateAdopter too if that is one. Two calls with one name give the same.
func (s *Stores) Of(instance string) blob.Store {
	v := view{inner: s.inner, chunker: s.chunker, space: digest.SpaceOf(instance)}
	switch {
	case s.far != nil:
		return farView{localView{view: v, local: s.local}, s.far}
	case s.local != nil:
		return localView{view: v, local: s.local}
	}
	return v
}

// view translates digests on the way in and out. Those that it is asked for are
// of the instance, and in no space yet. It has no Unwrap: nobody gets through it to
// the blobs of other instances.
type view struct {
	inner   blob.Store
	chunker blob.Chunker // nil: none
	space   digest.Space
}

var (
	_ blob.Store    = view{}
	_ blob.Chunker  = view{}
	_ blob.Repeater = view{}
	_ blob.Store    = localView{}
	_ blob.Linker   = localView{}
	_ blob.Adopter  = localView{}
	_ blob.Auditor  = localView{}
)

// in is d in the view's space.
func (v view) in(d digest.Digest) (digest.Digest, error) {
	if !d.Space().IsZero() {
		return d, fmt.Errorf("blob %s: within an instance there are no spaces: %w", d, errors.ErrUnsupported)
	}
	return d.In(v.space), nil
}

// allIn are ds in the view's space.
func (v view) allIn(ds []digest.Digest) ([]digest.Digest, error) {
	all := make([]digest.Digest, len(ds))
	for i, d := range ds {
		var err error
		if all[i], err = v.in(d); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Repeat implements blob.Repeater where the store does; elsewhere it calls f once.
func (v view) Repeat(ctx context.Context, f func(ctx context.Context) error) error {
	return blob.Repeat(ctx, v.inner, f) //nolint:wrapcheck // f's own
}

// FindMissing implements blob.Finder.
func (v view) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	all, err := v.allIn(ds)
	if err != nil {
		return nil, err
	}
	missing, err := v.inner.FindMissing(ctx, all)
	if err != nil {
		return nil, plain(err)
	}
	// What is missing is new, and this package's to change: see blob.Finder.
	for i, d := range missing {
		missing[i] = d.Plain()
	}
	return missing, nil
}

// Open implements blob.Opener.
func (v view) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	d, err := v.in(d)
	if err != nil {
		return nil, err
	}
	r, err := v.inner.Open(ctx, d, offset)
	return r, plain(err)
}

// Create implements blob.Creator.
func (v view) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	d, err := v.in(d)
	if err != nil {
		return nil, err
	}
	w, err := v.inner.Create(ctx, d)
	return w, plain(err)
}

// localView is the view of a store on the local disk.
type localView struct {
	view
	local *local
}

// Link implements blob.Linker.
func (v localView) Link(ctx context.Context, d digest.Digest, dst string, mode blob.LinkMode) error {
	d, err := v.in(d)
	if err != nil {
		return err
	}
	return v.local.Link(ctx, d, dst, mode) //nolint:wrapcheck // it says what of
}

// Adopt implements blob.Adopter.
func (v localView) Adopt(ctx context.Context, fn digest.Function, f *os.File) (digest.Digest, error) {
	d, err := v.local.AdoptIn(ctx, v.space, fn, f)
	return d.Plain(), err //nolint:wrapcheck // it says what of
}

// Audit implements blob.Auditor.
func (v localView) Audit(ctx context.Context, d digest.Digest, mode blob.LinkMode, linked time.Time) error {
	d, err := v.in(d)
	if err != nil {
		return err
	}
	return v.local.Audit(ctx, d, mode, linked) //nolint:wrapcheck // it says what of
}

// plain gives the blobs of a MissingError the names by which clients know them.
func plain(err error) error {
	missing, ok := errors.AsType[*blob.MissingError](err)
	if !ok {
		return err
	}
	ds := make([]digest.Digest, len(missing.Digests))
	for i, d := range missing.Digests {
		ds[i] = d.Plain()
	}
	return &blob.MissingError{Digests: ds}
}
