package file_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

// What a disk has changed while no process had the store open is never linked.
func TestStore_Link_after_restart(t *testing.T) {
	const regular, executable = "", ".x" // suffixes of the files
	for _, tc := range []struct {
		name  string
		size  int
		links []blob.LinkMode // before
		rot   string
		link  blob.LinkMode // after
		gone  bool
	}{
		{"large", 100_000, nil, regular, blob.LinkRegular, true},
		{"large, linked before", 100_000, []blob.LinkMode{blob.LinkRegular}, regular, blob.LinkRegular, true},
		{"executable copy of it", 100_000, nil, regular, blob.LinkExecutable, true},
		{"executable", 100_000, []blob.LinkMode{blob.LinkExecutable}, executable, blob.LinkExecutable, false},
		{"small", 1000, []blob.LinkMode{blob.LinkRegular}, regular, blob.LinkRegular, false},
		{"small executable", 1000, []blob.LinkMode{blob.LinkExecutable}, executable, blob.LinkExecutable, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir, links := t.TempDir(), t.TempDir()
			s := openQuiet(t, file.Options{Dir: dir, MaxPackedBytes: 16 << 10})
			data := blobtest.Random(1, tc.size)
			d, err := blob.PutBytes(t.Context(), s, digest.SHA256, data)
			must(t, err)
			for i, mode := range tc.links {
				must(t, s.Link(t.Context(), d, filepath.Join(links, fmt.Sprint("before", i)), mode))
			}
			must(t, s.Close())
			path := filepath.Join(dir, "cas", "sha256", d.Hash()[:2], fmt.Sprintf("%s-%d%s", d.Hash(), d.Size(), tc.rot))
			rot(t, path)
			reg := prometheus.NewPedanticRegistry()
			s = openQuiet(t, file.Options{Dir: dir, MaxPackedBytes: 16 << 10, Registerer: reg})
			dst := filepath.Join(links, "after")
			err = s.Link(t.Context(), d, dst, tc.link)
			if gone := errors.Is(err, blob.ErrNotFound); gone != tc.gone || err != nil && !gone {
				t.Fatalf("Link: %v", err)
			}
			if got := metric(t, reg, "corrupt_total"); got != 1 {
				t.Errorf("%v corrupt files were found, want 1", got)
			}
			if tc.gone {
				if _, err := os.Lstat(dst); err == nil {
					t.Error("it was linked")
				}
				// It can be brought back.
				_, err = blob.PutBytes(t.Context(), s, digest.SHA256, data)
				must(t, err)
				must(t, s.Link(t.Context(), d, dst, tc.link))
			}
			got, err := os.ReadFile(dst)
			must(t, err)
			if !bytes.Equal(got, data) {
				t.Error("wrong bytes were linked")
			}
		})
	}
}

// A file is read once, not at each link: what else should be as fast as a link?
func TestStore_Link_reads_once(t *testing.T) {
	dir, links := t.TempDir(), t.TempDir()
	s := openQuiet(t, file.Options{Dir: dir, MaxPackedBytes: 16 << 10})
	d, err := blob.PutBytes(t.Context(), s, digest.SHA256, []byte(strings.Repeat("x", 100_000)))
	must(t, err)
	must(t, s.Close())
	s = openQuiet(t, file.Options{Dir: dir, MaxPackedBytes: 16 << 10})
	must(t, s.Link(t.Context(), d, filepath.Join(links, "first"), blob.LinkRegular))
	rot(t, filepath.Join(links, "first")) // behind its back
	for i := range 10 {
		must(t, s.Link(t.Context(), d, filepath.Join(links, fmt.Sprint(i)), blob.LinkRegular))
	}
	if err := s.Check(t.Context(), d); !errors.Is(err, blob.ErrCorrupt) {
		t.Errorf("Check: %v, want ErrCorrupt: it was to be changed", err)
	}
}
