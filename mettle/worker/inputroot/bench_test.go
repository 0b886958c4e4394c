//go:build linux

package inputroot_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

// BenchmarkAffinity tells what a queue could gain by giving a job to the slot
// that ran one with the same inputs last: two slots and two input roots of 500
// files in 50 directories, each slot with its own root or in turn with both.
// The two are measured alternately; the figures are the medians.
func BenchmarkAffinity(b *testing.B) {
	f := newFixture(b, fileStore(b), inputroot.Options{})
	var roots [2]digest.Digest
	for r := range roots {
		root := &repb.Directory{}
		for d := range 50 {
			dir := &repb.Directory{}
			for i := range 10 {
				dir.Files = append(dir.Files, &repb.FileNode{Name: fmt.Sprint("file", i), Digest: f.put(b, fmt.Sprint(r, d, i))})
			}
			root.Directories = append(root.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("dir%02d", d), Digest: f.putMessage(b, dir)})
		}
		var err error
		if roots[r], err = digest.FromProto(digest.SHA256, f.putMessage(b, root)); err != nil {
			b.Fatal(err)
		}
	}
	base := b.TempDir()
	var shelves [2]*inputroot.Shelf
	for i := range shelves {
		shelves[i] = newShelf(b, filepath.Join(base, fmt.Sprint("shelf", i)))
	}
	once := func(slot, root int) time.Duration {
		dir := filepath.Join(base, fmt.Sprint("root", slot))
		start := time.Now()
		if _, err := f.builder.Build(b.Context(), inputroot.Request{Dir: dir, Digest: roots[root], Shelf: shelves[slot]}); err != nil {
			b.Fatal(err)
		}
		if err := shelves[slot].Remove(dir); err != nil {
			b.Fatal(err)
		}
		return time.Since(start)
	}
	var same, turns []time.Duration
	for i := 0; b.Loop(); i++ {
		for slot := range 2 {
			if i%2 == 0 {
				same = append(same, once(slot, slot))
			} else {
				turns = append(turns, once(slot, (slot+i/2)%2))
			}
		}
	}
	for name, took := range map[string][]time.Duration{"same-root-µs": same, "in-turn-µs": turns} {
		slices.Sort(took)
		if len(took) > 0 {
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), name)
		}
	}
}
