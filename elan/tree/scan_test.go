package tree

import (
	"slices"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mettle-build/mettle/elan/digest"
)

// scannable are Directories that scan is to read by itself.
func scannable() map[string]*repb.Directory {
	d := digest.Of(digest.SHA256, []byte("x")).Proto()
	empty := digest.Empty(digest.SHA256).Proto()
	return map[string]*repb.Directory{
		"empty":       {},
		"files":       {Files: []*repb.FileNode{{Name: "a", Digest: d}, {Name: "b", Digest: empty, IsExecutable: true}}},
		"directories": {Directories: []*repb.DirectoryNode{{Name: "a", Digest: d}, {Name: "b", Digest: empty}, {Name: "ü", Digest: d}}},
		"symlinks":    {Symlinks: []*repb.SymlinkNode{{Name: "a", Target: "../x"}}},
		"all": {
			Files:       []*repb.FileNode{{Name: "b", Digest: d}, {Name: "e", Digest: d}},
			Directories: []*repb.DirectoryNode{{Name: "a", Digest: d}, {Name: "d", Digest: d}},
			Symlinks:    []*repb.SymlinkNode{{Name: "c", Target: "b"}, {Name: "f", Target: "b"}},
		},
		"a large digest": {Files: []*repb.FileNode{{Name: "a", Digest: &repb.Digest{Hash: d.Hash, SizeBytes: 1 << 50}}}},
	}
}

func encode(t testing.TB, m proto.Message) []byte {
	t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestScan(t *testing.T) {
	for name, dir := range scannable() {
		children, ok := scan(digest.SHA256, encode(t, dir))
		if !ok || len(children) != len(dir.Directories) {
			t.Errorf("%s: %d children, %v; want %d, true", name, len(children), ok, len(dir.Directories))
		}
	}
}

// TestScan_unsure: what is wrong, or rare, is left to generated code.
func TestScan_unsure(t *testing.T) {
	d := digest.Of(digest.SHA256, []byte("x")).Proto()
	for name, dir := range map[string]*repb.Directory{
		"unsorted":            {Files: []*repb.FileNode{{Name: "b", Digest: d}, {Name: "a", Digest: d}}},
		"twice":               {Files: []*repb.FileNode{{Name: "a", Digest: d}}, Directories: []*repb.DirectoryNode{{Name: "a", Digest: d}}},
		"twice, and later":    {Files: []*repb.FileNode{{Name: "a", Digest: d}, {Name: "z", Digest: d}}, Symlinks: []*repb.SymlinkNode{{Name: "y", Target: "a"}, {Name: "z", Target: "a"}}},
		"no name":             {Files: []*repb.FileNode{{Digest: d}}},
		"dots":                {Directories: []*repb.DirectoryNode{{Name: "..", Digest: d}}},
		"a slash":             {Directories: []*repb.DirectoryNode{{Name: "a/b", Digest: d}}},
		"no digest":           {Directories: []*repb.DirectoryNode{{Name: "a"}}},
		"a digest of nothing": {Directories: []*repb.DirectoryNode{{Name: "a", Digest: &repb.Digest{}}}},
		"negative":            {Files: []*repb.FileNode{{Name: "a", Digest: &repb.Digest{Hash: d.Hash, SizeBytes: -1}}}},
		"no target":           {Symlinks: []*repb.SymlinkNode{{Name: "a"}}},
		"properties":          {NodeProperties: &repb.NodeProperties{UnixMode: wrapperspb.UInt32(0o644)}},
		"a file's properties": {Files: []*repb.FileNode{{Name: "a", Digest: d, NodeProperties: &repb.NodeProperties{}}}},
	} {
		if _, ok := scan(digest.SHA256, encode(t, dir)); ok {
			t.Errorf("%s: scan is sure", name)
		}
	}
}

// FuzzScan: what scan is sure of, generated code and Validate say too.
func FuzzScan(f *testing.F) {
	for _, dir := range scannable() {
		data := encode(f, dir)
		f.Add(data)
		f.Add(append(data, data...))
		if len(data) > 4 {
			f.Add(data[:len(data)-1])
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		children, ok := scan(digest.SHA256, data)
		if !ok {
			return
		}
		dir := &repb.Directory{}
		if err := proto.Unmarshal(data, dir); err != nil {
			t.Fatalf("scan is sure of what is malformed: %v", err)
		}
		if err := Validate(digest.SHA256, dir); err != nil {
			t.Fatalf("scan is sure of what is invalid: %v", err)
		}
		want := make([]digest.Digest, 0, len(dir.Directories))
		for _, c := range dir.Directories {
			d, err := digest.FromProto(digest.SHA256, c.Digest)
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, d)
		}
		if !slices.Equal(children, want) {
			t.Fatalf("children %v, want %v", children, want)
		}
	})
}
