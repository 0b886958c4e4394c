package chunked

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// LocalStore is a blob.Store on the local disk.
type LocalStore interface {
	blob.Store
	blob.Linker
	blob.Adopter
	blob.SpaceAdopter
	blob.Auditor
}

// Local is a Store around one on the local disk, and has its abilities.
type Local struct {
	*Store
	local LocalStore
}

var _ LocalStore = (*Local)(nil)

// NewLocal puts a Local around a store. Options.Store is not looked at.
func NewLocal(store LocalStore, o Options) (*Local, error) {
	if store == nil {
		return nil, errors.New("chunked: no store")
	}
	o.Store = store
	s, err := New(o)
	if err != nil {
		return nil, err
	}
	return &Local{Store: s, local: store}, nil
}

// Link implements blob.Linker. A blob that is kept in chunks is made whole first,
// once for all who link it; it stays whole, and in chunks, for its lifetime.
func (l *Local) Link(ctx context.Context, d digest.Digest, dst string, mode blob.LinkMode) error {
	for {
		err := l.local.Link(ctx, d, dst, mode)
		if err == nil || !errors.Is(err, blob.ErrNotFound) || !l.mayBeKept(d) {
			return err //nolint:wrapcheck // the store's own words
		}
		leave, wait := l.flights.enter(keptKey(d))
		if leave == nil {
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		err = l.makeWhole(ctx, d)
		leave()
		if err != nil {
			return fmt.Errorf("link blob %s: %w", d, err)
		}
		return l.local.Link(ctx, d, dst, mode) //nolint:wrapcheck // the store's own words
	}
}

func (l *Local) makeWhole(ctx context.Context, d digest.Digest) error {
	r, err := l.Open(ctx, d, 0)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // opened for reading
	if err := blob.Receive(ctx, l.local, d, r); err != nil {
		return err //nolint:wrapcheck // it says what was received
	}
	l.metrics.madeWhole.Inc()
	return nil
}

// Adopt implements blob.Adopter.
func (l *Local) Adopt(ctx context.Context, fn digest.Function, f *os.File) (digest.Digest, error) {
	return l.local.Adopt(ctx, fn, f) //nolint:wrapcheck // the store's own words
}

// AdoptIn implements blob.SpaceAdopter.
func (l *Local) AdoptIn(ctx context.Context, space digest.Space, fn digest.Function, f *os.File) (digest.Digest, error) {
	return l.local.AdoptIn(ctx, space, fn, f) //nolint:wrapcheck // the store's own words
}

// Audit implements blob.Auditor.
func (l *Local) Audit(ctx context.Context, d digest.Digest, mode blob.LinkMode, linked time.Time) error {
	return l.local.Audit(ctx, d, mode, linked) //nolint:wrapcheck // the store's own words
}
