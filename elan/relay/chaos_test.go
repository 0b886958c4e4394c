package relay_test

import (
	"bytes"
	"context"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/retry"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/relay"
)

// TestRelay_killsInTheMiddleOfEverything: clients as workers are, which try again
// what is UNAVAILABLE, read and write blobs of all sizes through a relay while one
// of its storage servers after the other is killed and comes back, and now and then
// both are away. All that is read is right, and nothing fails.
func TestRelay_killsInTheMiddleOfEverything(t *testing.T) {
	register := elan(t)
	servers := []*backend{started(t, register), started(t, register)}
	s := relayTo(t, relay.Options{}, servers...)
	r, err := retry.New(retry.Options{KeepBytes: 1}) // what Repeat is for, it does here
	if err != nil {
		t.Fatal(err)
	}
	store := r.Store(storeAt(t, s))

	var over atomic.Bool
	var clients errgroup.Group
	rounds := make([]int, 4)
	for i := range rounds {
		clients.Go(func() error {
			// Each at least once, and until the kills are over.
			for ; rounds[i] < 4 || !over.Load(); rounds[i]++ {
				size := []int{100, 20_000, 300_000, 2 << 20}[rounds[i]%4]
				if err := roundTrip(t.Context(), store, blobtest.Random(uint64(i*1000+rounds[i]), size)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	const kills = 12
	for i := range kills {
		b := servers[i%2]
		b.kill(t)
		if i%4 == 3 { // the other too
			servers[1-i%2].kill(t)
			for s.relay.Waiting() == 0 && t.Context().Err() == nil {
				time.Sleep(time.Millisecond) // until a call has met with that
			}
			servers[1-i%2].start(t)
		}
		b.start(t)
		waitForCall(t, store)
	}
	over.Store(true)
	if err := clients.Wait(); err != nil {
		t.Error(err)
	}
	t.Logf("%d kills; blobs of the clients: %v", kills+kills/4, rounds)
}

// waitForCall returns when the storage answers.
func waitForCall(t *testing.T, store blob.Store) {
	t.Helper()
	if _, err := store.FindMissing(t.Context(), []digest.Digest{digest.Of(digest.SHA256, []byte("x"))}); err != nil {
		t.Error(err)
	}
}

// roundTrip writes a blob and reads it.
func roundTrip(ctx context.Context, store blob.Store, data []byte) error {
	d := digest.Of(digest.SHA256, data)
	if err := blob.Repeat(ctx, store, func(ctx context.Context) error {
		return blob.Receive(ctx, store, d, bytes.NewReader(data))
	}); err != nil {
		return err
	}
	got, err := blob.ReadAll(ctx, store, d, d.Size())
	if err != nil {
		return err
	}
	return blob.ReceiveBytes(ctx, store, d, got) // verifies
}
