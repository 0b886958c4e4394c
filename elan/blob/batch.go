package blob

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/digest"
)

// What follows are abilities of stores that are a call away, over which many small
// blobs travel by one call rather than by one each. They are found by type
// assertion, or by ReadBatch and WriteBatch. Where a store, or one inside of it, has
// them not, the error is errors.ErrUnsupported itself, and nothing was done.

// singles is how many blobs ReadBatch and WriteBatch have under way where they go
// one by one.
const singles = 16

// BatchReader reads many blobs by few calls.
type BatchReader interface {
	// ReadBatch reads ds, each of which is named once, and calls take once for
	// each that it can tell of, with its number in ds: with its bytes, which are
	// as many as it has, and not verified, or with the error. Take may be called
	// by several goroutines at once, and keeps data. Those that take was not
	// called for have failed with the error that is returned. The caller bounds
	// how many bytes ds are in all: they may all be in memory at once.
	ReadBatch(ctx context.Context, ds []digest.Digest, take func(i int, data []byte, err error)) error
}

// Bytes is a blob in memory.
type Bytes struct {
	Digest digest.Digest
	Data   []byte
}

// BatchWriter writes many blobs by few calls.
type BatchWriter interface {
	// WriteBatch puts all of bs, each of which is there once, and whose bytes it
	// neither verifies nor keeps. Where it fails some may be there.
	WriteBatch(ctx context.Context, bs []Bytes) error
}

// Fetcher is a Linker that has not all of its blobs on the local disk.
type Fetcher interface {
	// Fetch brings those of ds to the local disk that are not there, by as few
	// calls as it takes, so that what follows finds them at hand. It returns those
	// that are nowhere, in no order. That a blob is fetched is no promise: where
	// the disk has no room for it, for one, Link finds another way.
	Fetch(ctx context.Context, ds []digest.Digest) (missing []digest.Digest, err error)
}

// TreeReader reads the Directories of a whole tree by one call.
type TreeReader interface {
	// ReadTree calls take with the bytes of each Directory that the store says is
	// root or below it, in an order of its own: they are not verified, may be none
	// of the tree's, or come twice, and when it has returned nil some may still be
	// lacking. Take keeps data; an error of it ends the call, and comes back as it is.
	ReadTree(ctx context.Context, root digest.Digest, take func(data []byte) error) error
}

// TreeFetcher is a Fetcher in front of a TreeReader.
type TreeFetcher interface {
	// FetchTree brings the Directories below root to the local disk by one call. Of
	// several FetchTree for one root at a time one does so, and the others wait. It
	// does nothing else if some, which are of them, are none, or any of these is there
	// already, or the other store can't do so: what is lacking afterwards is to be
	// fetched otherwise. For each Directory that comes it calls wanted with the digest
	// of its bytes, and keeps those for which that returns true.
	FetchTree(ctx context.Context, root digest.Digest, some []digest.Digest, wanted func(d digest.Digest, data []byte) bool) error
}

// LateAdopter is an Adopter in front of another store, which what is adopted also goes
// to: many small blobs do so together.
type LateAdopter interface {
	// AdoptLate is AdoptIn, but the blob goes to the other store only with Pass,
	// which the caller calls soon: until then nothing keeps it but its lifetime.
	AdoptLate(ctx context.Context, space digest.Space, fn digest.Function, f *os.File) (digest.Digest, error)
	// Pass puts the adopted blobs, and made, into all of the stores, by as few
	// calls as it takes. A blob may be named twice. It keeps nothing.
	Pass(ctx context.Context, adopted []digest.Digest, made []Bytes) error
}

// ReadBatch is BatchReader's for every store: where o is none, some blobs at a
// time are opened.
func ReadBatch(ctx context.Context, o Opener, ds []digest.Digest, take func(i int, data []byte, err error)) error {
	if b, ok := o.(BatchReader); ok {
		if err := b.ReadBatch(ctx, ds, take); !errors.Is(err, errors.ErrUnsupported) {
			return err //nolint:wrapcheck // the store's own
		}
	}
	var group errgroup.Group
	group.SetLimit(singles)
	for i, d := range ds {
		group.Go(func() error {
			data, err := ReadAll(ctx, o, d, d.Size())
			take(i, data, err)
			return nil
		})
	}
	return group.Wait() //nolint:wrapcheck // nil
}

// WriteBatch is BatchWriter's for every store: where c is none, some blobs at a
// time are written.
func WriteBatch(ctx context.Context, c Creator, bs []Bytes) error {
	if b, ok := c.(BatchWriter); ok {
		if err := b.WriteBatch(ctx, bs); !errors.Is(err, errors.ErrUnsupported) {
			return err //nolint:wrapcheck // the store's own
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(singles)
	for _, b := range bs {
		group.Go(func() error { return WriteBytes(ctx, c, b.Digest, b.Data) })
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("write %d blobs: %w", len(bs), err)
	}
	return nil
}
