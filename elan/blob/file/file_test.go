package file_test

import (
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
)

func open(t testing.TB, o file.Options) *file.Store {
	t.Helper()
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	if o.MaxPackedBytes == 0 {
		o.MaxPackedBytes = -1 // most tests look at files
	}
	s, err := file.New(o)
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

// openQuiet is open, and waits until the store has counted what is there.
func openQuiet(t testing.TB, o file.Options) *file.Store {
	t.Helper()
	s := open(t, o)
	<-s.Counted()
	return s
}

func options(maxPacked int64) blobtest.Options {
	return blobtest.Options{New: func(t testing.TB) blob.Store { return open(t, file.Options{MaxPackedBytes: maxPacked}) }}
}

func TestStore(t *testing.T) {
	for name, maxPacked := range map[string]int64{
		"files": -1, "packs_of_tiny_blobs": 10, "packs": 100 << 10,
	} {
		t.Run(name, func(t *testing.T) { blobtest.Run(t, options(maxPacked)) })
	}
}
