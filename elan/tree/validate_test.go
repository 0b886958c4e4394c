package tree_test

import (
	"errors"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tree"
)

func content(s string) *repb.Digest { return digest.Of(digest.SHA256, []byte(s)).Proto() }

func file(name string) *repb.FileNode { return &repb.FileNode{Name: name, Digest: content(name)} }

func dir(name string) *repb.DirectoryNode {
	return &repb.DirectoryNode{Name: name, Digest: content(name)}
}

func link(name, target string) *repb.SymlinkNode {
	return &repb.SymlinkNode{Name: name, Target: target}
}

func TestValidate(t *testing.T) {
	for _, tc := range []struct {
		name string
		dir  *repb.Directory
		want []string // parts of the error; none: valid
	}{
		{name: "empty", dir: &repb.Directory{}},
		{name: "all kinds", dir: &repb.Directory{
			Files:       []*repb.FileNode{file("B"), file("a"), file("é"), file("\U0001f600")},
			Directories: []*repb.DirectoryNode{dir("b"), dir("d")},
			Symlinks:    []*repb.SymlinkNode{link("c", "/abs"), link("e", "../../out")},
		}},
		{name: "names that only look odd", dir: &repb.Directory{
			Files: []*repb.FileNode{file(" "), file("..."), file("..a"), file("a\nb"), file(`a\b`)},
		}},
		{name: "empty directory as a child", dir: &repb.Directory{
			Directories: []*repb.DirectoryNode{{Name: "d", Digest: digest.Empty(digest.SHA256).Proto()}},
		}},
		{name: "absent", want: []string{"absent"}},
		{name: "empty name", dir: &repb.Directory{Files: []*repb.FileNode{file("")}}, want: []string{"file", "empty name"}},
		{name: "nil node", dir: &repb.Directory{Files: []*repb.FileNode{nil}}, want: []string{"empty name"}},
		{name: "dot", dir: &repb.Directory{Directories: []*repb.DirectoryNode{dir(".")}}, want: []string{`"."`}},
		{name: "dot dot", dir: &repb.Directory{Symlinks: []*repb.SymlinkNode{link("..", "x")}}, want: []string{"symlink", `".."`}},
		{name: "slash", dir: &repb.Directory{Files: []*repb.FileNode{file("a/b")}}, want: []string{`"a/b"`, "one path segment"}},
		{name: "leading slash", dir: &repb.Directory{Directories: []*repb.DirectoryNode{dir("/etc")}}, want: []string{`"/etc"`}},
		{name: "nul", dir: &repb.Directory{Files: []*repb.FileNode{file("a\x00b")}}, want: []string{"NUL"}},
		{name: "not utf-8", dir: &repb.Directory{Files: []*repb.FileNode{file("a\xff")}}, want: []string{"UTF-8"}},
		{name: "unsorted files", dir: &repb.Directory{Files: []*repb.FileNode{file("b"), file("a")}}, want: []string{`"a" stands after "b"`, "sorted"}},
		{name: "unsorted directories", dir: &repb.Directory{Directories: []*repb.DirectoryNode{dir("a"), dir("B")}}, want: []string{`"B" stands after "a"`}},
		{name: "unsorted symlinks", dir: &repb.Directory{Symlinks: []*repb.SymlinkNode{link("b", "x"), link("a", "x")}}, want: []string{"symlink", "sorted"}},
		{name: "the same file twice", dir: &repb.Directory{Files: []*repb.FileNode{file("a"), file("a")}}, want: []string{`"a"`, "each name once"}},
		{name: "file and directory", dir: &repb.Directory{
			Files: []*repb.FileNode{file("a"), file("m"), file("z")}, Directories: []*repb.DirectoryNode{dir("b"), dir("m")},
		}, want: []string{`"m"`, "a file and a directory"}},
		{name: "file and symlink", dir: &repb.Directory{
			Files: []*repb.FileNode{file("z")}, Directories: []*repb.DirectoryNode{dir("y")}, Symlinks: []*repb.SymlinkNode{link("a", "b"), link("z", "x")},
		}, want: []string{`"z"`, "a file and a symlink"}},
		{name: "directory and symlink", dir: &repb.Directory{
			Files: []*repb.FileNode{file("a")}, Directories: []*repb.DirectoryNode{dir("b"), dir("c")}, Symlinks: []*repb.SymlinkNode{link("c", "x")},
		}, want: []string{`"c"`, "a directory and a symlink"}},
		{name: "no digest", dir: &repb.Directory{Files: []*repb.FileNode{{Name: "a"}}}, want: []string{`file "a"`, "absent"}},
		{name: "short hash", dir: &repb.Directory{
			Directories: []*repb.DirectoryNode{{Name: "a", Digest: &repb.Digest{Hash: "abc", SizeBytes: 3}}},
		}, want: []string{`directory "a"`, "64"}},
		{name: "negative size", dir: &repb.Directory{
			Files: []*repb.FileNode{{Name: "a", Digest: &repb.Digest{Hash: content("x").Hash, SizeBytes: -1}}},
		}, want: []string{`file "a"`, "negative"}},
		{name: "no target", dir: &repb.Directory{Symlinks: []*repb.SymlinkNode{link("a", "")}}, want: []string{`symlink "a"`, "empty"}},
		{name: "nul in target", dir: &repb.Directory{Symlinks: []*repb.SymlinkNode{link("a", "b\x00c")}}, want: []string{`symlink "a"`, "NUL"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tree.Validate(digest.SHA256, tc.dir)
			if len(tc.want) == 0 {
				if err != nil {
					t.Fatalf("Validate: %v, want nil", err)
				}
				return
			}
			if !errors.Is(err, tree.ErrInvalid) {
				t.Fatalf("Validate: %v, want an error that wraps ErrInvalid", err)
			}
			for _, part := range tc.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("Validate: %q, want it to say %q", err, part)
				}
			}
		})
	}
}

// FuzzValidate holds what the users of Validate rely on: in a Directory that
// passes, the names are single segments, and no two are equal.
func FuzzValidate(f *testing.F) {
	for _, d := range []*repb.Directory{
		{Files: []*repb.FileNode{file("a"), file("b")}, Directories: []*repb.DirectoryNode{dir("c")}, Symlinks: []*repb.SymlinkNode{link("d", "a")}},
		{Files: []*repb.FileNode{file("b")}, Symlinks: []*repb.SymlinkNode{link("a", "x"), link("b", "x")}},
		{Directories: []*repb.DirectoryNode{dir("..")}},
	} {
		data, err := proto.Marshal(d)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		d := &repb.Directory{}
		if proto.Unmarshal(data, d) != nil || tree.Validate(digest.SHA256, d) != nil {
			return
		}
		seen := map[string]bool{}
		check := func(name string) {
			if seen[name] || name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
				t.Errorf("Validate let the name %q pass in %v", name, d)
			}
			seen[name] = true
		}
		for _, n := range d.Files {
			check(n.Name)
		}
		for _, n := range d.Directories {
			check(n.Name)
		}
		for _, n := range d.Symlinks {
			check(n.Name)
		}
	})
}
