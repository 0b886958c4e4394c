package client_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/instances"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

// registerApart registers services that keep the blobs of instances apart.
func registerApart(t testing.TB, g *grpc.Server) {
	t.Helper()
	store, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	apart, err := instances.New(t.Context(), store)
	if err != nil {
		t.Fatal(err)
	}
	actions, err := action.New(action.Options{Store: store, Stores: apart.Of, Entries: store})
	if err != nil {
		t.Fatal(err)
	}
	if err := rpc.Register(g, rpc.Options{Store: store, Stores: apart.Of, Actions: actions}); err != nil {
		t.Fatal(err)
	}
}

func newInstances(t testing.TB) *client.Instances {
	t.Helper()
	s, err := client.NewInstances(client.Options{Conn: start(t, registerApart)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// One instance, in its space, is a store as others are.
func TestInstances(t *testing.T) {
	blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store {
		s := newInstances(t)
		s.Of("some/instance")
		return instances.Over(s).Of("some/instance")
	}})
}

// What is in one instance is in no other, here as there.
func TestInstances_apart(t *testing.T) {
	s := newInstances(t)
	a, b := digest.SpaceOf("a"), digest.SpaceOf("")
	data := []byte("data")
	plain := digest.Of(digest.SHA256, data)
	if _, err := s.FindMissing(t.Context(), []digest.Digest{plain.In(a)}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("an instance that nobody has named: %v, want ErrUnsupported", err)
	}
	s.Of("a")
	s.Of("")
	if err := blob.ReceiveBytes(t.Context(), s, plain.In(a), data); err != nil {
		t.Fatal(err)
	}
	all := []digest.Digest{plain.In(b), plain.In(a), plain.In(b), digest.Empty(digest.SHA256)}
	if missing, err := s.FindMissing(t.Context(), all); err != nil || !slices.Equal(missing, all[:1]) {
		t.Errorf("missing are %v, %v, want %v", missing, err, all[:1])
	}
	if _, err := s.Open(t.Context(), plain.In(b), 0); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("open in another instance: %v, want ErrNotFound", err)
	}
	if got, err := blob.ReadAll(t.Context(), s.Of("a"), plain, 10); err != nil || string(got) != "data" {
		t.Errorf("read %q, %v", got, err)
	}
}

// Names that clients think of take no memory for ever.
func TestInstances_bounded(t *testing.T) {
	s := newInstances(t)
	first := s.Of("first")
	for i := range 4095 {
		s.Of(fmt.Sprint(i))
	}
	if s.Of("first") != first {
		t.Error("an instance was forgotten too early")
	}
	s.Of("one more")
	d := digest.Of(digest.SHA256, []byte("x"))
	if _, err := s.FindMissing(t.Context(), []digest.Digest{d.In(digest.SpaceOf("0"))}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("the instance that was used least recently: %v, want ErrUnsupported", err)
	}
	if s.Of("first") != first {
		t.Error("an instance that was used was forgotten")
	}
}
