//go:build linux

package output_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker/output"
)

// paths draws those of a tree's files, with few names, so that subtrees come twice.
func paths(t *rapid.T) []string {
	name := rapid.SampledFrom([]string{"a", "b", "B", "é", "a-b", "a.b"})
	file := rapid.Custom(func(t *rapid.T) string {
		p := "d"
		for _, dir := range rapid.SliceOfN(name, 0, 3).Draw(t, "directories") {
			p += "/" + dir + "-dir"
		}
		return p + "/" + name.Draw(t, "file")
	})
	return rapid.SliceOfNDistinct(file, 1, 30, rapid.ID[string]).Draw(t, "files")
}

// The same directory gives the same Tree, in whatever order it was made; and the Tree
// is as OutputDirectory.is_topologically_sorted has it.
func TestCollector_Collect_isDeterministic(t *testing.T) {
	f := newFixture(t, remote(t), output.Options{})
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		all := paths(rt)
		collect := func(order []string) *repb.ActionResult {
			n++
			f.root = filepath.Join(filepath.Dir(f.root), fmt.Sprint(n))
			if err := os.Mkdir(f.root, 0o755); err != nil { //nolint:gosec // as input roots are
				rt.Fatal(err)
			}
			for _, p := range order {
				p = filepath.Join(f.root, p)
				if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil { //nolint:gosec // as above
					rt.Fatal(err)
				}
				var err error
				if filepath.Base(p) == "B" {
					err = os.Symlink("a", p)
				} else {
					err = os.WriteFile(p, []byte(filepath.Base(p)), 0o644) //nolint:gosec // as above
				}
				if err != nil {
					rt.Fatal(err)
				}
			}
			got, err := f.collect(t, &repb.Command{OutputPaths: []string{"d"}, OutputDirectoryFormat: repb.Command_TREE_AND_DIRECTORY})
			if err != nil {
				rt.Fatal(err)
			}
			if err := os.RemoveAll(f.root); err != nil {
				rt.Fatal(err)
			}
			return got.Result
		}
		first := collect(all)
		shuffled := rapid.Permutation(all).Draw(rt, "order")
		if diff := cmp.Diff(first, collect(shuffled), protocmp.Transform()); diff != "" {
			rt.Fatalf("result (-first +shuffled):\n%s", diff)
		}
		slices.Sort(all)
		if diff := cmp.Diff(first, collect(all), protocmp.Transform()); diff != "" {
			rt.Fatalf("result (-first +sorted):\n%s", diff)
		}
		checkSorted(rt, f, f.read(t, first.OutputDirectories[0].TreeDigest), first.OutputDirectories[0].RootDirectoryDigest)
	})
}

// checkSorted checks the encoding of a Tree against the specification.
func checkSorted(t *rapid.T, f *fixture, tree []byte, root *repb.Digest) {
	known := map[string]bool{} // the directories that a parent has named
	seen := map[string]bool{}
	for i := 0; len(tree) > 0; i++ {
		tag := byte(0x12)
		if i == 0 {
			tag = 0x0a
		}
		if tree[0] != tag {
			t.Fatalf("record %d has tag %#x, want %#x", i, tree[0], tag)
		}
		data, n := protowire.ConsumeBytes(tree[1:])
		if n < 0 {
			t.Fatalf("record %d is malformed", i)
		}
		tree = tree[1+n:]
		d := digest.Of(f.fn, data)
		if i == 0 && d.Hash() != root.GetHash() {
			t.Fatalf("the root is %s, want %v", d, root)
		}
		if i > 0 && !known[d.Hash()] {
			t.Fatalf("directory %d, %s, comes before its parents, or has none", i, d)
		}
		if seen[d.Hash()] {
			t.Fatalf("directory %s comes twice", d)
		}
		seen[d.Hash()] = true
		m := &repb.Directory{}
		if err := proto.Unmarshal(data, m); err != nil {
			t.Fatal(err)
		}
		again, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil || !bytes.Equal(again, data) {
			t.Fatalf("directory %s is not in canonical form", d)
		}
		for _, c := range m.Directories {
			known[c.Digest.Hash] = true
		}
	}
	if len(known) != len(seen)-1 {
		t.Fatalf("%d directories are named, and %d are there beside the root", len(known), len(seen)-1)
	}
}
