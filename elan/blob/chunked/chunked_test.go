package chunked_test

import (
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/mem"
)

func openMem(t testing.TB, o mem.Options) *mem.Store {
	t.Helper()
	s, err := mem.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func openFile(t testing.TB, dir string) *file.Store {
	t.Helper()
	s, err := file.New(file.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

// inner is what New takes, in one.
type inner interface {
	blob.Store
	blob.Entries
}

func around(t testing.TB, s inner) *chunked.Store {
	t.Helper()
	c, err := chunked.New(chunked.Options{Store: s, Entries: s})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func aroundFile(t testing.TB, s *file.Store) *chunked.Local {
	t.Helper()
	c, err := chunked.NewLocal(s, chunked.Options{Entries: s})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestStore_mem(t *testing.T) {
	blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store { return around(t, openMem(t, mem.Options{})) }})
}

func TestStore_file(t *testing.T) {
	blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store { return aroundFile(t, openFile(t, t.TempDir())) }})
}
