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

// tree10k puts an input root of 10,000 files in 100 directories, of which every
// hundredth file says what it is given.
func tree10k(t testing.TB, f *fixture, changed string) digest.Digest {
	t.Helper()
	root := &repb.Directory{}
	for d := range 100 {
		dir := &repb.Directory{}
		for i := range 100 {
			content := fmt.Sprint(d, " ", i)
			if i == 50 {
				content += changed
			}
			dir.Files = append(dir.Files, &repb.FileNode{Name: fmt.Sprintf("file%02d", i), Digest: f.put(t, content)})
		}
		root.Directories = append(root.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("dir%02d", d), Digest: f.putMessage(t, dir)})
	}
	d, err := digest.FromProto(digest.SHA256, f.putMessage(t, root))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// BenchmarkRoot10k makes and removes input roots of 10,000 files: one that the slot
// had before, one of which a hundredth is new, and one that it never had. The figures
// are medians of both together.
func BenchmarkRoot10k(b *testing.B) {
	for name, tc := range map[string]struct {
		policy inputroot.LinkPolicy
		owner  inputroot.Owner
	}{
		"user":  {inputroot.Link, inputroot.Owner{Set: true, UID: 65000, GID: 65000}},
		"audit": {inputroot.LinkAndAudit, inputroot.Owner{}},
	} {
		b.Run(name, func(b *testing.B) {
			f := newFixture(b, fileStore(b), inputroot.Options{Policy: tc.policy})
			base := b.TempDir()
			took := map[string][]time.Duration{}
			shelves := 0
			var shelf *inputroot.Shelf
			once := func(what string, d digest.Digest) {
				start := time.Now()
				root, err := f.builder.Build(b.Context(), inputroot.Request{Dir: f.dir, Digest: d, Owner: tc.owner, Shelf: shelf, Directories: []string{"out"}})
				if err != nil {
					b.Fatal(err)
				}
				if err := root.Audit(b.Context()); err != nil {
					b.Fatal(err)
				}
				built := time.Since(start)
				if err := shelf.Remove(f.dir); err != nil {
					b.Fatal(err)
				}
				took[what+"-ms"] = append(took[what+"-ms"], time.Since(start))
				took[what+"-build-ms"] = append(took[what+"-build-ms"], built)
			}
			for b.Loop() {
				b.StopTimer()
				var err error
				if shelf, err = inputroot.NewShelf(filepath.Join(base, fmt.Sprint("shelf", shelves)), tc.owner); err != nil {
					b.Fatal(err)
				}
				first, second := tree10k(b, f, fmt.Sprint("a", shelves)), tree10k(b, f, fmt.Sprint("b", shelves))
				b.StartTimer()
				once("new", first)
				once("warm", first)
				once("changed", second)
				once("warm", second)
				b.StopTimer()
				shelf.Close()
				shelves++
				b.StartTimer()
			}
			for name, t := range took {
				slices.Sort(t)
				b.ReportMetric(float64(t[len(t)/2].Microseconds())/1000, name)
			}
		})
	}
}

// BenchmarkRoot makes and removes small input roots, of files in one directory, with
// the directory of an output among them: the same one again and again, and in turn
// ones that share nothing.
func BenchmarkRoot(b *testing.B) {
	for _, files := range []int{1, 5, 50, 500} {
		for name, roots := range map[string]int{"same": 1, "other": 100} {
			b.Run(fmt.Sprintf("%d/%s", files, name), func(b *testing.B) {
				f := newFixture(b, fileStore(b), inputroot.Options{Policy: inputroot.Link})
				owner := inputroot.Owner{Set: true, UID: 65000, GID: 65000}
				shelf, err := inputroot.NewShelf(filepath.Join(b.TempDir(), "shelf"), owner)
				if err != nil {
					b.Fatal(err)
				}
				defer shelf.Close()
				ds := make([]digest.Digest, roots)
				for r := range ds {
					dir := &repb.Directory{}
					for i := range files {
						dir.Files = append(dir.Files, &repb.FileNode{Name: fmt.Sprintf("file%03d", i), Digest: f.put(b, fmt.Sprint(r, i))})
					}
					if ds[r], err = digest.FromProto(digest.SHA256, f.putMessage(b, dir)); err != nil {
						b.Fatal(err)
					}
				}
				for i := 0; b.Loop(); i++ {
					if _, err := f.builder.Build(b.Context(), inputroot.Request{Dir: f.dir, Digest: ds[i%roots], Owner: owner, Shelf: shelf, Directories: []string{"out"}}); err != nil {
						b.Fatal(err)
					}
					if err := shelf.Remove(f.dir); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
