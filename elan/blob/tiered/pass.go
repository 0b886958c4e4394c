package tiered

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// AdoptLate implements blob.LateAdopter.
func (l local) AdoptLate(ctx context.Context, space digest.Space, fn digest.Function, f *os.File) (digest.Digest, error) {
	return l.adopter.AdoptIn(ctx, space, fn, f) //nolint:wrapcheck // the store's own
}

// Pass implements blob.LateAdopter: one question about all of them, if they are
// so large that it is worth it, and then batches, and streams for what is large.
func (l local) Pass(ctx context.Context, adopted []digest.Digest, made []blob.Bytes) error {
	ds, inMemory, total := passed(adopted, made)
	if l.t == nil {
		return l.keepMade(ctx, l.s.authority, inMemory)
	}
	if err := l.keepMade(ctx, l.t.Store, inMemory); err != nil {
		l.s.log.Debug("blobs were not put into a tier", "tier", l.t.Name, "error", err)
	}
	if err := l.toAuthority(ctx, ds, inMemory, total); err != nil {
		return fmt.Errorf("pass on %d blobs: %w", len(ds), err)
	}
	for _, d := range ds {
		l.s.touches.told(d)
	}
	return nil
}

// passed are the blobs that are to be passed on, each once, and how many bytes they
// have. Those of made are in inMemory too.
func passed(adopted []digest.Digest, made []blob.Bytes) (ds []digest.Digest, inMemory map[digest.Digest][]byte, total int64) {
	inMemory = make(map[digest.Digest][]byte, len(made))
	seen := make(map[digest.Digest]struct{}, len(adopted)+len(made))
	add := func(d digest.Digest) {
		if _, again := seen[d]; again || d.IsEmpty() {
			return
		}
		seen[d] = struct{}{}
		ds = append(ds, d)
		total += d.Size()
	}
	for _, d := range adopted {
		add(d)
	}
	for _, b := range made {
		inMemory[b.Digest] = b.Data
		add(b.Digest)
	}
	return ds, inMemory, total
}

// keepMade puts what is in memory into a store.
func (l local) keepMade(ctx context.Context, c blob.Creator, inMemory map[digest.Digest][]byte) error {
	for d, data := range inMemory {
		if err := blob.WriteBytes(ctx, c, d, data); err != nil {
			return err //nolint:wrapcheck // it says what was written
		}
	}
	return nil
}

// toAuthority passes on what the authority lacks.
func (l local) toAuthority(ctx context.Context, ds []digest.Digest, inMemory map[digest.Digest][]byte, total int64) error {
	if total >= askFirst {
		var err error
		if ds, err = l.s.authority.FindMissing(ctx, ds); err != nil {
			return err //nolint:wrapcheck // the store's own
		}
	}
	batches, large := l.s.split(ds)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(fetchesAtOnce)
	for _, batch := range batches {
		group.Go(func() error { return l.passBatch(ctx, batch, inMemory) })
	}
	for _, d := range large {
		group.Go(func() error {
			if data, ok := inMemory[d]; ok {
				return blob.WriteBytes(ctx, l.s.authority, d, data)
			}
			return lost(d, l.send(ctx, d))
		})
	}
	return group.Wait() //nolint:wrapcheck // it says what was written
}

// passBatch passes small blobs on together. The memory that they take is bounded
// with that of those that are fetched.
func (l local) passBatch(ctx context.Context, ds []digest.Digest, inMemory map[digest.Digest][]byte) error {
	total := int64(0)
	for _, d := range ds {
		total += d.Size()
	}
	if err := l.s.memory.Acquire(ctx, total); err != nil {
		return err //nolint:wrapcheck // the context's own
	}
	defer l.s.memory.Release(total)
	bs := make([]blob.Bytes, len(ds))
	for i, d := range ds {
		data, ok := inMemory[d]
		if !ok {
			var err error
			if data, err = read(ctx, l.t.Store, d, l.t.Trusted); err != nil {
				return lost(d, fmt.Errorf("blob %s: %w", d, err))
			}
		}
		bs[i] = blob.Bytes{Digest: d, Data: data}
	}
	return blob.WriteBatch(ctx, l.s.authority, bs) //nolint:wrapcheck // it says what was written
}

// lost is err, but where the tier has evicted d before it was passed on: then its
// maker is to try again. Not found is what a caller says of what it lacks itself.
func lost(d digest.Digest, err error) error {
	if !errors.Is(err, blob.ErrNotFound) {
		return err
	}
	return fmt.Errorf("%w: blob %s was evicted before it was passed on", blob.ErrUnavailable, d)
}
