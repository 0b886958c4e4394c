package instances

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// farView is the view of a store that has not all of its blobs on the local disk.
type farView struct {
	localView
	far *far
}

var (
	_ blob.Fetcher     = farView{}
	_ blob.LateAdopter = farView{}
	_ blob.TreeFetcher = farView{}
)

// Fetch implements blob.Fetcher.
func (v farView) Fetch(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	all, err := v.allIn(ds)
	if err != nil {
		return nil, err
	}
	missing, err := v.far.Fetch(ctx, all)
	for i, d := range missing {
		missing[i] = d.Plain()
	}
	return missing, plain(err)
}

// FetchTree implements blob.TreeFetcher, where the store inside does.
func (v farView) FetchTree(ctx context.Context, root digest.Digest, some []digest.Digest, wanted func(d digest.Digest, data []byte) bool) error {
	if v.far.trees == nil {
		return nil
	}
	in, err := v.in(root)
	if err != nil {
		return err
	}
	all, err := v.allIn(some)
	if err != nil {
		return err
	}
	return plain(v.far.trees.FetchTree(ctx, in, all, func(d digest.Digest, data []byte) bool { return wanted(d.Plain(), data) }))
}

// AdoptLate implements blob.LateAdopter, in the zero space only, as the digests
// that a view is given are.
func (v farView) AdoptLate(ctx context.Context, space digest.Space, fn digest.Function, f *os.File) (digest.Digest, error) {
	if !space.IsZero() {
		return digest.Digest{}, fmt.Errorf("adopt: within an instance there are no spaces: %w", errors.ErrUnsupported)
	}
	d, err := v.far.AdoptLate(ctx, v.space, fn, f)
	return d.Plain(), err //nolint:wrapcheck // it says what of
}

// Pass implements blob.LateAdopter.
func (v farView) Pass(ctx context.Context, adopted []digest.Digest, made []blob.Bytes) error {
	all, err := v.allIn(adopted)
	if err != nil {
		return err
	}
	bs := make([]blob.Bytes, len(made))
	for i, b := range made {
		bs[i].Data = b.Data
		if bs[i].Digest, err = v.in(b.Digest); err != nil {
			return err
		}
	}
	return plain(v.far.Pass(ctx, all, bs))
}
