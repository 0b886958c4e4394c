package relay_test

import (
	"bytes"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/relay"
)

// TestRelay_isAStore: who asks the relay has the same as who asks the storage.
func TestRelay_isAStore(t *testing.T) {
	blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store {
		register := elan(t)
		return storeAt(t, relayTo(t, relay.Options{}, started(t, register), started(t, register)))
	}})
}

func storeAt(t testing.TB, s *side) *client.Client {
	t.Helper()
	c, err := client.New(client.Options{Conn: s.conn})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestRelay_storageGoesAndReturns: calls of all kinds are made while one server
// after the other, and then both, are away. None fails.
func TestRelay_storageGoesAndReturns(t *testing.T) {
	register := elan(t)
	a, b := started(t, register), newBackend(t, register)
	s := relayTo(t, relay.Options{}, a, b)
	// The test's own connection to the relay is there from now on.
	if _, err := s.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	store := storeAt(t, s)
	n := 0
	use := func(when string) {
		t.Helper()
		for range 20 {
			n++
			data := blobtest.Random(uint64(n), 20_000)
			d := digest.Of(digest.SHA256, data)
			if missing, err := store.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 {
				t.Fatalf("%s: find: %v, %v", when, missing, err)
			}
			if err := blob.Receive(t.Context(), store, d, bytes.NewReader(data)); err != nil {
				t.Fatalf("%s: write: %v", when, err)
			}
			if got, err := blob.ReadAll(t.Context(), store, d, d.Size()); err != nil || !bytes.Equal(got, data) {
				t.Fatalf("%s: read: %d bytes, %v", when, len(got), err)
			}
		}
	}
	use("with one of two servers")
	b.start(t)
	use("with both servers")
	a.kill(t)
	use("after one was killed")
	b.kill(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		use("while both are away")
	}()
	for s.relay.Waiting() == 0 {
		select {
		case <-done:
			t.Fatal("the calls ended without a storage")
		default:
		}
	}
	a.start(t)
	<-done
}
