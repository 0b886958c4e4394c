package instances_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/instances"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

// newStores returns views of a store on disk, where it matters most, or in memory.
func newStores(t testing.TB, onDisk bool) (*instances.Stores, blob.Store) {
	t.Helper()
	var inner blob.Store
	if onDisk {
		s, err := file.New(file.Options{Dir: filepath.Join(t.TempDir(), "store"), MaxBytes: 1 << 30, MinFreeBytes: 1})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
		inner = s
	} else {
		s, err := mem.New(mem.Options{})
		if err != nil {
			t.Fatal(err)
		}
		inner = s
	}
	stores, err := instances.New(t.Context(), inner)
	if err != nil {
		t.Fatal(err)
	}
	return stores, inner
}

func TestStores(t *testing.T) {
	for name, onDisk := range map[string]bool{"file": true, "mem": false} {
		t.Run(name, func(t *testing.T) {
			blobtest.Run(t, blobtest.Options{LargeBytes: 2 << 20, FindDigests: 1000, Functions: []digest.Function{digest.SHA256, digest.GITSHA1}, New: func(t testing.TB) blob.Store {
				stores, _ := newStores(t, onDisk)
				return stores.Of("main")
			}})
		})
	}
}

// TestStores_apart: what one instance has, no other learns of, and neither does
// the unnamed one.
func TestStores_apart(t *testing.T) {
	for name, onDisk := range map[string]bool{"file": true, "mem": false} {
		t.Run(name, func(t *testing.T) {
			stores, inner := newStores(t, onDisk)
			data := blobtest.Random(1, 5000)
			d := blobtest.Put(t, stores.Of("a"), digest.SHA256, data)
			for _, instance := range []string{"b", "", "a/", "A"} {
				s := stores.Of(instance)
				if missing, err := s.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 || missing[0] != d {
					t.Errorf("in %q: missing %v, %v; want %s", instance, missing, err, d)
				}
				if _, err := s.Open(t.Context(), d, 0); !errors.Is(err, blob.ErrNotFound) {
					t.Errorf("open in %q: %v, want ErrNotFound", instance, err)
				}
			}
			if missing, err := inner.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 {
				t.Errorf("in no space: missing %v, %v; want the blob", missing, err)
			}
			if got, err := blob.ReadAll(t.Context(), stores.Of("a"), d, 5000); err != nil || !bytes.Equal(got, data) {
				t.Errorf("in its own instance: %d bytes, %v", len(got), err)
			}
			if stores.Of("a") != stores.Of("a") || stores.Of("a") == stores.Of("b") {
				t.Error("views are not equal where their instances are")
			}
		})
	}
}

// TestStores_local: linking and adopting stay within an instance.
func TestStores_local(t *testing.T) {
	stores, _ := newStores(t, true)
	a, b := stores.Of("a"), stores.Of("b")
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("output"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d, err := a.(blob.Adopter).Adopt(t.Context(), digest.SHA256, f)
	if want := digest.Of(digest.SHA256, []byte("output")); err != nil || d != want {
		t.Fatalf("Adopt: %s, %v; want %s", d, err, want)
	}
	if err := a.(blob.Linker).Link(t.Context(), d, path+"a", blob.LinkRegular); err != nil {
		t.Errorf("link in its own instance: %v", err)
	}
	if err := a.(blob.Auditor).Audit(t.Context(), d, blob.LinkRegular, time.Now()); err != nil {
		t.Errorf("audit in its own instance: %v", err)
	}
	if err := b.(blob.Linker).Link(t.Context(), d, path+"b", blob.LinkRegular); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("link in another instance: %v, want ErrNotFound", err)
	}
	if err := b.(blob.Auditor).Audit(t.Context(), d, blob.LinkRegular, time.Now()); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("audit in another instance: %v, want ErrNotFound", err)
	}
}

// TestNew_refuses a store that would put all instances into one.
func TestNew_refuses(t *testing.T) {
	s, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f := blobtest.Faulty{Store: s, Fault: func(blobtest.Op, digest.Digest) error { return errors.ErrUnsupported }}
	if _, err := instances.New(t.Context(), f); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("%v, want ErrUnsupported", err)
	}
}
