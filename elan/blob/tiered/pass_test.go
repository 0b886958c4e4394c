package tiered_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// A cache that has lost what it adopted, before that was passed on, is trouble that
// passes, and not a blob that its caller lacks.
func TestPass_evicted(t *testing.T) {
	_, cache, s := newBatched(t, 0)
	for _, tc := range []struct {
		name string
		size int
	}{{"small", 100}, {"large", 3 << 20}} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "out")
			if err := os.WriteFile(path, make([]byte, tc.size), 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			d, err := s.(blob.LateAdopter).AdoptLate(t.Context(), digest.Space{}, digest.SHA256, f)
			if err != nil {
				t.Fatal(err)
			}
			if err := cache.Remove(t.Context(), d); err != nil {
				t.Fatal(err)
			}
			err = s.(blob.LateAdopter).Pass(t.Context(), []digest.Digest{d}, nil)
			if !errors.Is(err, blob.ErrUnavailable) || errors.Is(err, blob.ErrNotFound) {
				t.Errorf("%v, want ErrUnavailable only", err)
			}
		})
	}
}
