//go:build linux

package persistent

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tree"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

// splitTest is an input root to be split.
type splitTest struct {
	store  blob.Store
	inputs *Inputs
}

func newSplitTest(t testing.TB) *splitTest {
	t.Helper()
	store, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	in, err := NewInputs(store, inputroot.Copy)
	if err != nil {
		t.Fatal(err)
	}
	return &splitTest{store, in}
}

// put stores a directory of the files whose paths are given; those that end in * are
// marked, those that end in / are empty directories, and those with -> are symlinks.
func (s *splitTest) put(t testing.TB, paths []string) digest.Digest {
	t.Helper()
	m, below := &repb.Directory{}, map[string][]string{}
	for _, p := range paths {
		if dir, rest, ok := strings.Cut(p, "/"); ok && !strings.Contains(dir, "->") {
			below[dir] = append(below[dir], rest)
			continue
		}
		if p == "" {
			continue
		}
		if name, target, ok := strings.Cut(p, "->"); ok {
			m.Symlinks = append(m.Symlinks, &repb.SymlinkNode{Name: name, Target: target})
			continue
		}
		name, marked := strings.CutSuffix(p, "*")
		f := &repb.FileNode{Name: name, Digest: digest.Of(digest.SHA256, []byte(name)).Proto()}
		if marked {
			f.NodeProperties = &repb.NodeProperties{Properties: []*repb.NodeProperty{{Name: toolInput}}}
		}
		m.Files = append(m.Files, f)
	}
	slices.SortFunc(m.Files, func(a, b *repb.FileNode) int { return strings.Compare(a.Name, b.Name) })
	for _, dir := range slices.Sorted(maps.Keys(below)) {
		m.Directories = append(m.Directories, &repb.DirectoryNode{Name: dir, Digest: s.put(t, below[dir]).Proto()})
	}
	d, err := blob.PutMessage(t.Context(), s.store, digest.SHA256, m)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// list lists an input root as put takes it, from what the builder would read.
func (s *splitTest) list(t testing.TB, at string, d digest.Digest) []string {
	t.Helper()
	m := &repb.Directory{}
	if err := blob.ReadMessage(t.Context(), s.inputs.held, d, 1<<20, m); err != nil {
		t.Fatal(err)
	}
	if err := tree.Validate(digest.SHA256, m); err != nil {
		t.Errorf("directory %q: %v", at, err)
	}
	var all []string
	for _, f := range m.Files {
		p := at + f.Name
		if isToolInput(f.NodeProperties) {
			p += "*"
		}
		all = append(all, p)
	}
	for _, l := range m.Symlinks {
		all = append(all, at+l.Name+"->"+l.Target)
	}
	for _, c := range m.Directories {
		cd, err := digest.FromProto(digest.SHA256, c.Digest)
		if err != nil {
			t.Fatal(err)
		}
		below := s.list(t, at+c.Name+"/", cd)
		if len(below) == 0 {
			below = []string{at + c.Name + "/"}
		}
		all = append(all, below...)
	}
	slices.Sort(all)
	return all
}

func request(root digest.Digest, wd string, startup ...string) *Request {
	return &Request{Root: root, Command: &repb.Command{WorkingDirectory: wd}, Tool: &Tool{Startup: append(startup, persistentFlag)}}
}

func TestInputs_split(t *testing.T) {
	for _, tc := range []struct {
		name             string
		paths            string
		wd, startup      string
		tool, rest, seen string // "" is nothing
	}{
		{name: "nothing"},
		{name: "no tool", paths: "a b/c d/", rest: "a b/c d/", seen: "a b/c"},
		{name: "marked", paths: "a t* d/e d/t*", tool: "d/t* t*", rest: "a d/e", seen: "a t d/e d/t"},
		{name: "a directory that is all the tool's", paths: "a jdk/bin/java* jdk/lib*", tool: "jdk/bin/java* jdk/lib*", rest: "a", seen: "a jdk/lib jdk/bin/java"},
		{name: "all", paths: "t* d/t*", tool: "d/t* t*", seen: "t d/t"},
		{name: "empty directories and symlinks are the action's", paths: "t* d/t* d/e/ d/l->t", tool: "d/t* t*", rest: "d/e/ d/l->t", seen: "t d/t"},
		{name: "what is marked counts, not what is named", paths: "t* x", startup: "x", tool: "t*", rest: "x", seen: "t x"},
		{name: "named", paths: "bin/x a b.jar c.jar", startup: "./bin/x -jar=b.jar --cp=nowhere:c.jar: a/.. .", tool: "b.jar bin/x c.jar", rest: "a", seen: "a b.jar c.jar bin/x"},
		{name: "directories that are named can be anything", paths: "x src/a", startup: "x src --in=src", tool: "x", rest: "src/a", seen: "x src/a"},
		{
			name: "runfiles", paths: "x x.runfiles/a x.runfiles/d/b x.runfiles/l->../x x.repo_mapping y.runfiles/c", startup: "x y",
			tool: "x x.repo_mapping x.runfiles/a x.runfiles/d/b x.runfiles/l->../x", rest: "y.runfiles/c",
			seen: "x x.repo_mapping x.runfiles/a x.runfiles/d/b y.runfiles/c",
		},
		{name: "in a working directory", paths: "w/d/x w/y a", wd: "w/d", startup: "./x ../y", tool: "w/d/x w/y", rest: "a", seen: "../../a ../../w/y x"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newSplitTest(t)
			root := s.put(t, strings.Fields(tc.paths))
			in, err := s.inputs.split(t.Context(), request(root, tc.wd, append(strings.Fields(tc.startup), "-")...))
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(s.list(t, "", in.tool), " "); got != tc.tool {
				t.Errorf("tool %q, want %q", got, tc.tool)
			}
			if got := strings.Join(s.list(t, "", in.rest), " "); got != tc.rest {
				t.Errorf("rest %q, want %q", got, tc.rest)
			}
			var seen []string
			for _, f := range in.files {
				seen = append(seen, f.Path)
			}
			if got := strings.Join(seen, " "); got != tc.seen {
				t.Errorf("files %q, want %q", got, tc.seen)
			}
			s.inputs.release(in)
			if len(s.inputs.held.blobs) > 0 {
				t.Errorf("%d blobs are still held", len(s.inputs.held.blobs))
			}
		})
	}
}

// The two parts of any input root are together what it was, and a change outside the
// tool changes nothing of it.
func TestInputs_split_anything(t *testing.T) {
	s := newSplitTest(t)
	rnd := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // any will do
	for range 200 {
		var paths []string
		for i := range rnd.IntN(12) {
			p := fmt.Sprint("f", i)
			for range rnd.IntN(4) {
				p = fmt.Sprint("d", rnd.IntN(3), "/") + p
			}
			if rnd.IntN(2) == 0 {
				p += "*"
			}
			paths = append(paths, p)
		}
		slices.Sort(paths)
		split := func(paths []string) *inputs {
			in, err := s.inputs.split(t.Context(), request(s.put(t, paths), "", "tool"))
			if err != nil {
				t.Fatalf("%q: %v", paths, err)
			}
			return in
		}
		in := split(paths)
		got := append(s.list(t, "", in.tool), s.list(t, "", in.rest)...)
		slices.Sort(got)
		if d := cmp.Diff(paths, got); len(paths) > 0 && d != "" {
			t.Fatalf("(-want +got):\n%s", d)
		}
		if other := split(append(paths, "z")); other.tool != in.tool {
			t.Errorf("%q: another input makes another tool", paths)
		}
		if other := split(append(paths, "z*")); other.tool == in.tool {
			t.Errorf("%q: another tool file makes no other tool", paths)
		}
	}
}

// What one message can describe, many times over, is bounded.
func TestInputs_split_bounds(t *testing.T) {
	s := newSplitTest(t)
	long := strings.Repeat("x", 200)
	d := s.put(t, []string{long})
	for depth := range 60 {
		m := &repb.Directory{}
		for i := range 2 {
			m.Directories = append(m.Directories, &repb.DirectoryNode{Name: fmt.Sprint(long, i), Digest: d.Proto()})
		}
		next, err := blob.PutMessage(t.Context(), s.store, digest.SHA256, m)
		if err != nil {
			t.Fatal(err)
		}
		if d = next; depth == 10 {
			if _, err := s.inputs.split(t.Context(), request(d, "", "tool")); err != nil {
				t.Errorf("2,000 files: %v", err)
			}
		}
	}
	if _, err := s.inputs.split(t.Context(), request(d, "", "tool")); !errors.Is(err, tree.ErrInvalid) {
		t.Errorf("2^60 files: error %v", err)
	}
	if _, err := s.inputs.split(t.Context(), request(digest.Of(digest.SHA256, []byte("nowhere")), "", "tool")); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("a root that is nowhere: error %v", err)
	}
	if len(s.inputs.held.blobs) > 0 {
		t.Errorf("%d blobs are still held", len(s.inputs.held.blobs))
	}
}
