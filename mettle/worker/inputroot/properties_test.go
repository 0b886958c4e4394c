//go:build linux

package inputroot_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

// Modes and modification times are those that inputs have in their node properties,
// whatever is made around them; a directory that can't be written to has had its
// outputs' directories made before.
func TestBuilder_Build_properties(t *testing.T) {
	properties := func(mode uint32, day int64) *repb.NodeProperties {
		return &repb.NodeProperties{UnixMode: wrapperspb.UInt32(mode), Mtime: timestamppb.New(time.Unix(day*86400, 7))}
	}
	for name, newStore := range stores() {
		t.Run(name, func(t *testing.T) {
			store, policy := newStore(t)
			f := newFixture(t, store, inputroot.Options{Policy: policy})
			file := f.put(t, "some bytes")
			inner := f.putMessage(t, &repb.Directory{
				Files:          []*repb.FileNode{{Name: "file", Digest: file, NodeProperties: properties(0o604, 3)}},
				NodeProperties: properties(0o2055, 2),
			})
			if _, err := f.build(t, f.putMessage(t, &repb.Directory{
				Files:          []*repb.FileNode{{Name: "plain", Digest: file}},
				Directories:    []*repb.DirectoryNode{{Name: "closed", Digest: inner}},
				Symlinks:       []*repb.SymlinkNode{{Name: "link", Target: "nowhere", NodeProperties: &repb.NodeProperties{Mtime: timestamppb.New(time.Unix(4*86400, 7))}}},
				NodeProperties: properties(0o711, 1),
			}), "closed/out"); err != nil {
				t.Fatal(err)
			}
			defer os.Chmod(filepath.Join(f.dir, "closed"), 0o755) //nolint:errcheck,gosec // so that it can be removed
			for path, want := range map[string]struct {
				mode os.FileMode
				day  int64
			}{
				"":            {os.ModeDir | 0o711, 1},
				"closed":      {os.ModeDir | 0o555, 2},
				"closed/file": {0o604, 3},
				"closed/out":  {os.ModeDir | 0o755, 0},
				"link":        {os.ModeSymlink | 0o777, 4},
				"plain":       {0o444, 0},
			} {
				st, err := os.Lstat(filepath.Join(f.dir, path))
				if err != nil {
					t.Error(err)
					continue
				}
				if st.Mode() != want.mode || want.day > 0 && !st.ModTime().Equal(time.Unix(want.day*86400, 7)) {
					t.Errorf("%q: %v, %v, want %v, day %d", path, st.Mode(), st.ModTime(), want.mode, want.day)
				}
			}
		})
	}
}
