package tiered_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"

	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/tiered"
	"github.com/mettle-build/mettle/elan/digest"
)

// batched is an authority that is read in batches. Each is told of, and goes on when
// hook returns.
type batched struct {
	*spy
	hook func(ctx context.Context, ds []digest.Digest) error

	mu      sync.Mutex // guards the rest
	batches int
	sent    map[digest.Digest]int
}

func (b *batched) ReadBatch(ctx context.Context, ds []digest.Digest, take func(i int, data []byte, err error)) error {
	b.mu.Lock()
	b.batches++
	for _, d := range ds {
		b.sent[d]++
	}
	b.mu.Unlock()
	if b.hook != nil {
		if err := b.hook(ctx, ds); err != nil {
			return err
		}
	}
	for i, d := range ds {
		data, err := blob.ReadAll(ctx, b.Store, d, d.Size())
		take(i, data, err)
	}
	return nil
}

func newBatched(t testing.TB, maxFillBytes int64) (*batched, *file.Store, blob.Store) {
	t.Helper()
	b, cache := &batched{spy: newSpy(t), sent: map[digest.Digest]int{}}, newFile(t)
	return b, cache, newTiered(t, tiered.Options{
		Tiers:        []tiered.Tier{{Name: "cache", Store: cache}, {Name: "low", Store: b}},
		MaxFillBytes: maxFillBytes,
	})
}

func (b *batched) put(t testing.TB, n, size int) (ds []digest.Digest) {
	t.Helper()
	for i := range n {
		d, err := blob.PutBytes(t.Context(), b.Store, digest.SHA256, blobtest.Random(uint64(i), size))
		if err != nil {
			t.Fatal(err)
		}
		ds = append(ds, d)
	}
	return ds
}

// However little memory there is for them, blobs come, each once, and slots do not
// keep each other waiting.
func TestFetch_memory(t *testing.T) {
	b, cache, s := newBatched(t, 3000)
	ds := b.put(t, 50, 1000)
	var slots errgroup.Group
	for i := range 4 {
		slots.Go(func() error {
			mine := append(append([]digest.Digest{}, ds[i*10:]...), ds[:i*10]...)
			missing, err := s.(blob.Fetcher).Fetch(t.Context(), mine)
			if len(missing) > 0 {
				return fmt.Errorf("missing %v", missing)
			}
			return err
		})
	}
	if err := slots.Wait(); err != nil {
		t.Fatal(err)
	}
	if missing, err := cache.FindMissing(t.Context(), ds); err != nil || len(missing) > 0 {
		t.Errorf("%d are not in the cache, %v", len(missing), err)
	}
	for d, n := range b.sent {
		if n != 1 {
			t.Errorf("blob %s was sent %d times", d, n)
		}
	}
}

// One who leaves takes nothing from those who wait for the same.
func TestFetch_cancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, _, s := newBatched(t, 0)
		ds := b.put(t, 10, 100)
		goOn := make(chan struct{})
		b.hook = func(ctx context.Context, _ []digest.Digest) error {
			select {
			case <-goOn:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		left, stayed := make(chan error, 1), make(chan error, 1)
		go func() {
			_, err := s.(blob.Fetcher).Fetch(ctx, ds)
			left <- err
		}()
		synctest.Wait()
		go func() {
			data, err := blob.ReadAll(t.Context(), s, ds[7], 100)
			if err == nil && digest.Of(digest.SHA256, data) != ds[7] {
				err = errors.New("other bytes")
			}
			stayed <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("who left: %v, want Canceled", err)
		}
		close(goOn)
		if err := <-stayed; err != nil {
			t.Errorf("who stayed: %v", err)
		}
		if b.batches != 1 || b.count(blobtest.OpOpen) != 0 {
			t.Errorf("%d batches and %d single reads, want one batch", b.batches, b.count(blobtest.OpOpen))
		}
	})
}

// When all have left, nothing goes on.
func TestFetch_abandoned(t *testing.T) {
	b, _, s := newBatched(t, 0)
	ds := b.put(t, 10, 100)
	begun, ended := make(chan struct{}), make(chan struct{})
	b.hook = func(ctx context.Context, _ []digest.Digest) error {
		close(begun)
		<-ctx.Done()
		close(ended)
		return ctx.Err()
	}
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := s.(blob.Fetcher).Fetch(ctx, ds)
		left <- err
	}()
	<-begun
	cancel()
	<-ended
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want Canceled", err)
	}
	// And is begun anew for who comes later.
	b.hook = nil
	if missing, err := s.(blob.Fetcher).Fetch(t.Context(), ds); err != nil || len(missing) > 0 {
		t.Errorf("later: missing %v, %v", missing, err)
	}
}

// An authority that is away is not one that has not the blobs.
func TestFetch_unavailable(t *testing.T) {
	b, _, s := newBatched(t, 0)
	ds := b.put(t, 3, 100)
	b.hook = func(context.Context, []digest.Digest) error { return blob.ErrUnavailable }
	if missing, err := s.(blob.Fetcher).Fetch(t.Context(), ds); !errors.Is(err, blob.ErrUnavailable) || len(missing) > 0 {
		t.Errorf("missing %v, %v, want ErrUnavailable", missing, err)
	}
}
