package tree_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tree"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// blobs is a blob.Opener of what is in it.
type blobs map[digest.Digest][]byte

func (b blobs) Open(_ context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	data, ok := b[d]
	if !ok && !d.IsEmpty() {
		return nil, fmt.Errorf("test: %w", blob.ErrNotFound)
	}
	return io.NopCloser(bytes.NewReader(data[offset:])), nil
}

// put stores a Directory, by its encoding.
func (b blobs) put(t testing.TB, dir *repb.Directory) digest.Digest {
	t.Helper()
	d, data, err := digest.OfMessage(digest.SHA256, dir)
	if err != nil {
		t.Fatal(err)
	}
	b[d] = data
	return d
}

// parent is a Directory with the given children.
func parent(children ...digest.Digest) *repb.Directory {
	dir := &repb.Directory{}
	for i, c := range children {
		dir.Directories = append(dir.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("d%06d", i), Digest: c.Proto()})
	}
	return dir
}

// leaf is a Directory with one file.
func leaf(name string) *repb.Directory {
	return &repb.Directory{Files: []*repb.FileNode{file(name)}}
}

// walk returns what w visits.
func walk(t *testing.T, w tree.Walk, root digest.Digest) (visited []digest.Digest, err error) {
	t.Helper()
	err = w.Each(t.Context(), root, func(d digest.Digest, _ *repb.Directory) error {
		visited = append(visited, d)
		return nil
	})
	return visited, err
}

func TestWalk_breadth_first_each_once(t *testing.T) {
	b := blobs{}
	x, y := b.put(t, leaf("x")), b.put(t, leaf("y"))
	left, right := b.put(t, parent(x, y)), b.put(t, parent(y, x, x))
	root := b.put(t, parent(left, right, y))
	got, err := walk(t, tree.Walk{Opener: b}, root)
	if want := []digest.Digest{root, left, right, y, x}; err != nil || !slices.Equal(got, want) {
		t.Errorf("visited %v, %v, want %v", got, err, want)
	}
}

func TestWalk_diamonds(t *testing.T) {
	b := blobs{}
	d := b.put(t, leaf("x"))
	for range 1000 {
		d = b.put(t, parent(d, d, d))
	}
	if got, err := walk(t, tree.Walk{Opener: b}, d); err != nil || len(got) != 1001 {
		t.Errorf("visited %d, %v, want 1001", len(got), err)
	}
}

func TestWalk_wide(t *testing.T) {
	b := blobs{}
	var children []digest.Digest
	for i := range 1000 {
		children = append(children, b.put(t, leaf(fmt.Sprint(i))))
	}
	root := b.put(t, parent(children...))
	got, err := walk(t, tree.Walk{Opener: b}, root)
	if err != nil || !slices.Equal(got, append([]digest.Digest{root}, children...)) {
		t.Errorf("visited %d, %v, want root and 1000 children in order", len(got), err)
	}
}

func TestWalk_missing(t *testing.T) {
	b := blobs{}
	gone := b.put(t, leaf("gone"))
	there := b.put(t, leaf("there"))
	root := b.put(t, parent(gone, there))
	delete(b, gone)
	var missing []digest.Digest
	got, err := walk(t, tree.Walk{Opener: b, Missing: func(d digest.Digest) { missing = append(missing, d) }}, root)
	if err != nil || !slices.Equal(got, []digest.Digest{root, there}) || !slices.Equal(missing, []digest.Digest{gone}) {
		t.Errorf("visited %v, missed %v, %v", got, missing, err)
	}
	if _, err := walk(t, tree.Walk{Opener: b}, gone); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("missing root: %v, want ErrNotFound", err)
	}
}

func TestWalk_refusals(t *testing.T) {
	b := blobs{}
	text := digest.Of(digest.SHA256, []byte("no Directory"))
	b[text] = []byte("no Directory")
	bad := b.put(t, &repb.Directory{Files: []*repb.FileNode{file("..")}})
	huge, err := digest.New(digest.SHA256, text.Hash(), 1<<62)
	if err != nil {
		t.Fatal(err)
	}
	three := b.put(t, parent(b.put(t, leaf("a")), b.put(t, leaf("b"))))
	for _, tc := range []struct {
		name string
		walk tree.Walk
		root digest.Digest
		want error
	}{
		{"no Directory", tree.Walk{Opener: b}, text, blob.ErrMalformed},
		{"no Directory below", tree.Walk{Opener: b}, b.put(t, parent(text, three)), blob.ErrMalformed},
		{"not canonical", tree.Walk{Opener: b}, bad, tree.ErrInvalid},
		{"declared huge", tree.Walk{Opener: b}, huge, blob.ErrTooLarge},
		{"declared huge below", tree.Walk{Opener: b}, b.put(t, parent(huge, three)), blob.ErrTooLarge},
		{"too many", tree.Walk{Opener: b, MaxDirectories: 2}, three, blob.ErrTooLarge},
		{"too large", tree.Walk{Opener: b, MaxDirectoryBytes: 10}, three, blob.ErrTooLarge},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := walk(t, tc.walk, tc.root); !errors.Is(err, tc.want) {
				t.Errorf("Each: %v, want %v", err, tc.want)
			}
		})
	}
	if _, err := walk(t, tree.Walk{Opener: b, MaxDirectories: 3}, three); err != nil {
		t.Errorf("Each of three at a limit of three: %v", err)
	}
}

func TestWalk_ends_with_the_visitor(t *testing.T) {
	b := blobs{}
	root := b.put(t, parent(b.put(t, leaf("a"))))
	stop := errors.New("stop")
	visits := 0
	err := tree.Walk{Opener: b}.Each(t.Context(), root, func(digest.Digest, *repb.Directory) error { visits++; return stop })
	if !errors.Is(err, stop) || visits != 1 {
		t.Errorf("%d visits, %v, want one and the visitor's error", visits, err)
	}
}

// encode makes a Tree of the raw Directories, the root first.
func encode(dirs ...[]byte) (data []byte) {
	for i, raw := range dirs {
		data = protowire.AppendTag(data, protowire.Number(min(i, 1)+1), protowire.BytesType)
		data = protowire.AppendBytes(data, raw)
	}
	return data
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	_, data, err := digest.OfMessage(digest.SHA256, m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestCheck(t *testing.T) {
	child := marshal(t, leaf("x"))
	// Not as anybody marshals it, yet valid: an unknown field in front.
	odd := append(protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 7), child...)
	of := func(raw []byte) digest.Digest { return digest.Of(digest.SHA256, raw) }
	for _, tc := range []struct {
		name  string
		tree  []byte
		root  []byte
		files int
		dirs  int
		want  string // part of the error
	}{
		{name: "no bytes at all"},
		{name: "empty root", tree: encode(nil)},
		{name: "root alone", tree: encode(child), root: child, files: 1},
		{name: "child", tree: encode(marshal(t, parent(of(child))), child), root: marshal(t, parent(of(child))), files: 1, dirs: 1},
		{name: "child twice", tree: encode(marshal(t, parent(of(child), of(child))), child), root: marshal(t, parent(of(child), of(child))), files: 1, dirs: 2},
		{name: "child with an odd encoding", tree: encode(marshal(t, parent(of(odd))), odd), root: marshal(t, parent(of(odd))), files: 1, dirs: 1},
		{name: "empty child left out", tree: encode(marshal(t, parent(of(nil)))), root: marshal(t, parent(of(nil))), dirs: 1},
		{name: "unreferenced child", tree: encode(nil, child), files: 1},
		{name: "child not held", tree: encode(marshal(t, parent(of(child)))), want: "does not hold"},
		{name: "grandchild not held", tree: encode(nil, marshal(t, parent(of(child)))), want: "does not hold"},
		{name: "two roots", tree: append(encode(child), encode(child)...), want: "2 root"},
		{name: "cut short", tree: encode(child)[:20], want: "malformed"},
		{name: "no Tree", tree: []byte("\xff\xff"), want: "malformed"},
		{name: "no Directory in it", tree: encode([]byte("\xff")), want: "no Directory"},
		{name: "not canonical", tree: encode(nil, marshal(t, leaf(".."))), want: `".."`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := tree.Check(digest.SHA256, tc.tree)
			if tc.want != "" {
				if !errors.Is(err, tree.ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("Check: %v, want an ErrInvalid that says %q", err, tc.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.Root != of(tc.root) || len(got.Files) != tc.files || len(got.Directories) != tc.dirs {
				t.Errorf("Check: %+v, want root %s, %d files and %d directories", got, of(tc.root), tc.files, tc.dirs)
			}
			read, err := tree.Read(digest.SHA256, tc.tree)
			if err != nil || !slices.Equal(read.Files, got.Files) || !slices.Equal(read.Directories, got.Directories) {
				t.Errorf("Read: %+v, %v, want what Check gave", read, err)
			}
		})
	}
}

// FuzzCheck holds that what Check passes reads the same as the message.
func FuzzCheck(f *testing.F) {
	child := marshal(f, leaf("x"))
	f.Add(encode(marshal(f, parent(digest.Of(digest.SHA256, child))), child))
	f.Add(encode(nil, child))
	f.Add([]byte{0x0a, 0x00, 0x12})
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := tree.Check(digest.SHA256, data)
		if err != nil {
			if !errors.Is(err, tree.ErrInvalid) {
				t.Errorf("Check: %v, want an error that wraps ErrInvalid", err)
			}
			return
		}
		m := &repb.Tree{}
		if proto.Unmarshal(data, m) != nil {
			return // strings that are not UTF-8 in fields that nobody reads
		}
		files := len(m.GetRoot().GetFiles())
		for _, c := range m.Children {
			files += len(c.Files)
		}
		if files != len(got.Files) {
			t.Errorf("Check found %d files, the message has %d", len(got.Files), files)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	root := &repb.Directory{}
	for i := range 1000 {
		root.Files = append(root.Files, file(fmt.Sprintf("f%06d", i)))
	}
	data := encode(marshal(b, root))
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := tree.Read(digest.SHA256, data); err != nil {
			b.Fatal(err)
		}
	}
}
