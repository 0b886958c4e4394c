package asset_test

import (
	"errors"
	"testing"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/instances"
	"github.com/mettle-build/mettle/elan/digest"
)

// TestInstances_apart: what is fetched for an instance is in its blobs, and what is
// pushed must be.
func TestInstances_apart(t *testing.T) {
	store := newStore(t)
	stores, err := instances.New(t.Context(), store)
	if err != nil {
		t.Fatal(err)
	}
	a := newService(t, store, asset.Options{Store: store, Stores: stores.Of, Entries: store})
	site := newSite(t, serving("source"))
	d := of("source")
	for _, instance := range []string{"a", "b"} {
		if _, err := stores.Of(instance).Open(t.Context(), d, 0); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("in %s before it is fetched: %v, want ErrNotFound", instance, err)
		}
		push := asset.Push{Instance: instance, URIs: []string{"https://pushed.example/x"}, Digest: d}
		if err := a.PushBlob(t.Context(), push); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("push into %s what it does not have: %v, want ErrNotFound", instance, err)
		}
		got, err := a.FetchBlob(t.Context(), asset.Request{Instance: instance, URIs: []string{site.URL + "/x"}})
		if err != nil || got.Digest != d {
			t.Fatalf("fetch for %s: %v, %v", instance, got, err)
		}
		if data, err := blob.ReadAll(t.Context(), stores.Of(instance), d, 100); err != nil || string(data) != "source" {
			t.Errorf("in %s: %q, %v", instance, data, err)
		}
		if err := a.PushBlob(t.Context(), push); err != nil {
			t.Errorf("push into %s: %v", instance, err)
		}
	}
	if n := len(site.requests()); n != 2 {
		t.Errorf("the origin was asked %d times, want once for each instance", n)
	}
	if missing, err := store.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 {
		t.Errorf("for everybody: missing %v, %v; want the blob", missing, err)
	}
}
