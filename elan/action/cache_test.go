package action_test

import (
	"errors"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

func newCache(t *testing.T, s *fakeStore) *action.Cache {
	t.Helper()
	c, err := action.New(action.Options{Store: s, Entries: s})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func key() blob.EntryKey {
	return blob.EntryKey{Instance: "i", Action: digest.Of(digest.SHA256, []byte("action"))}
}

// putMessage stores m as a blob.
func putMessage(t *testing.T, s *fakeStore, m proto.Message) digest.Digest {
	t.Helper()
	_, data, err := digest.OfMessage(digest.SHA256, m)
	if err != nil {
		t.Fatal(err)
	}
	return s.put(data)
}

// result is a result with every kind of reference, and the blobs that it needs.
func result(t *testing.T, s *fakeStore) (*repb.ActionResult, map[string]digest.Digest) {
	t.Helper()
	needs := map[string]digest.Digest{}
	put := func(name string) *repb.Digest {
		needs[name] = s.put([]byte(name))
		return needs[name].Proto()
	}
	inner := &repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: put("file in a child of the Tree")}}}
	innerDigest, _, err := digest.OfMessage(digest.SHA256, inner)
	if err != nil {
		t.Fatal(err)
	}
	root := &repb.Directory{
		Files:       []*repb.FileNode{{Name: "f", Digest: put("file in the root of the Tree")}},
		Directories: []*repb.DirectoryNode{{Name: "d", Digest: innerDigest.Proto()}},
	}
	needs["Tree"] = putMessage(t, s, &repb.Tree{Root: root, Children: []*repb.Directory{inner}})

	below := &repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: put("file below the root Directory")}}}
	needs["Directory below the root"] = putMessage(t, s, below)
	needs["root Directory"] = putMessage(t, s, &repb.Directory{
		Directories: []*repb.DirectoryNode{{Name: "d", Digest: needs["Directory below the root"].Proto()}},
	})

	both := &repb.Directory{Files: []*repb.FileNode{{Name: "b", Digest: put("file in both forms")}}}
	needs["root Directory beside a Tree"] = putMessage(t, s, both)
	needs["Tree beside a root Directory"] = putMessage(t, s, &repb.Tree{Root: both})

	return &repb.ActionResult{
		OutputFiles: []*repb.OutputFile{{Path: "out", Digest: put("output file")}, {Path: "empty", Digest: digest.Empty(digest.SHA256).Proto()}},
		OutputDirectories: []*repb.OutputDirectory{
			{Path: "tree", TreeDigest: needs["Tree"].Proto()},
			{Path: "directory", RootDirectoryDigest: needs["root Directory"].Proto()},
			{Path: "", TreeDigest: needs["Tree beside a root Directory"].Proto(), RootDirectoryDigest: needs["root Directory beside a Tree"].Proto()},
		},
		OutputSymlinks: []*repb.OutputSymlink{{Path: "link", Target: "/anywhere"}},
		StdoutDigest:   put("stdout"),
		StderrDigest:   put("stderr"),
	}, needs
}

func TestCache_complete_result(t *testing.T) {
	s := newFakeStore(t)
	c := newCache(t, s)
	want, _ := result(t, s)
	if err := c.Put(t.Context(), key(), want); err != nil {
		t.Fatal(err)
	}
	s.Finds() // those of Put
	got, err := c.Get(t.Context(), key())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if n := s.Finds(); n != 1 {
		t.Errorf("Get asked the store %d times, want once for everything", n)
	}
	other := key()
	other.Instance = "another"
	if _, err := c.Get(t.Context(), other); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("Get in another instance: %v, want ErrNotFound", err)
	}
}

func TestCache_anything_missing(t *testing.T) {
	_, needs := result(t, newFakeStore(t))
	for name, d := range needs {
		t.Run(name, func(t *testing.T) {
			s := newFakeStore(t)
			c := newCache(t, s)
			r, _ := result(t, s)
			if err := c.Put(t.Context(), key(), r); err != nil {
				t.Fatal(err)
			}
			s.remove(d)
			if _, err := c.Get(t.Context(), key()); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("Get: %v, want ErrNotFound", err)
			}
			if s.entries() != 0 {
				t.Error("the entry is still there")
			}
			err := c.Put(t.Context(), key(), r)
			var missing *blob.MissingError
			if !errors.As(err, &missing) || len(missing.Digests) != 1 || missing.Digests[0] != d {
				t.Errorf("Put: %v, want a MissingError of %s", err, d)
			}
			if s.entries() != 0 {
				t.Error("Put made an entry")
			}
		})
	}
}

func TestCache_store_trouble_is_not_absence(t *testing.T) {
	s := newFakeStore(t)
	c := newCache(t, s)
	r, _ := result(t, s)
	if err := c.Put(t.Context(), key(), r); err != nil {
		t.Fatal(err)
	}
	s.Fail(blob.ErrUnavailable)
	if _, err := c.Get(t.Context(), key()); !errors.Is(err, blob.ErrUnavailable) || errors.Is(err, blob.ErrNotFound) {
		t.Errorf("Get: %v, want ErrUnavailable alone", err)
	}
	if err := c.Put(t.Context(), key(), r); !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("Put: %v, want ErrUnavailable", err)
	}
	s.Fail(nil)
	if _, err := c.Get(t.Context(), key()); err != nil {
		t.Errorf("Get when the store is back: %v, want the result", err)
	}
}

func TestGet_drops_what_is_no_result(t *testing.T) {
	failed, err := proto.Marshal(&repb.ActionResult{ExitCode: 2})
	if err != nil {
		t.Fatal(err)
	}
	malformed, err := proto.Marshal(&repb.ActionResult{StdoutDigest: &repb.Digest{Hash: "x"}})
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string][]byte{"garbage": []byte("\xff\xff\xff"), "failed": failed, "malformed digest": malformed} {
		t.Run(name, func(t *testing.T) {
			s := newFakeStore(t)
			if err := s.mem.PutEntry(t.Context(), key(), value); err != nil {
				t.Fatal(err)
			}
			if _, err := newCache(t, s).Get(t.Context(), key()); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("Get: %v, want ErrNotFound", err)
			}
			if s.entries() != 0 {
				t.Error("the entry is still there")
			}
		})
	}
}

func TestPut_refusals(t *testing.T) {
	s := newFakeStore(t)
	x := s.put([]byte("x"))
	dir := &repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: x.Proto()}}}
	whole := putMessage(t, s, &repb.Tree{Root: dir})
	open := putMessage(t, s, &repb.Tree{Root: &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "d", Digest: x.Proto()}}}})
	unsorted := putMessage(t, s, &repb.Tree{Root: &repb.Directory{Files: []*repb.FileNode{{Name: "b", Digest: x.Proto()}, {Name: "a", Digest: x.Proto()}}}})
	file := func(path string, d *repb.Digest) *repb.ActionResult {
		return &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: path, Digest: d}}}
	}
	directory := func(o *repb.OutputDirectory) *repb.ActionResult {
		return &repb.ActionResult{OutputDirectories: []*repb.OutputDirectory{o}}
	}
	for _, tc := range []struct {
		name string
		r    *repb.ActionResult
		want error
	}{
		{"absent", nil, action.ErrInvalid},
		{"failed", &repb.ActionResult{ExitCode: -1}, action.ErrNotCacheable},
		{"file without a path", file("", x.Proto()), action.ErrInvalid},
		{"file with an absolute path", file("/etc/passwd", x.Proto()), action.ErrInvalid},
		{"file without a digest", file("a", nil), action.ErrInvalid},
		{"file of another function", file("a", digest.Of(digest.SHA1, []byte("x")).Proto()), action.ErrInvalid},
		{"stdout malformed", &repb.ActionResult{StdoutDigest: &repb.Digest{}}, action.ErrInvalid},
		{"directory without a digest", directory(&repb.OutputDirectory{Path: "d"}), action.ErrInvalid},
		{"directory with an absolute path", directory(&repb.OutputDirectory{Path: "/d", TreeDigest: whole.Proto()}), action.ErrInvalid},
		{"Tree that is none", directory(&repb.OutputDirectory{TreeDigest: x.Proto()}), action.ErrInvalid},
		{"Tree that is not whole", directory(&repb.OutputDirectory{TreeDigest: open.Proto()}), action.ErrInvalid},
		{"Tree that is unsorted", directory(&repb.OutputDirectory{TreeDigest: unsorted.Proto()}), action.ErrInvalid},
		{"Tree with another root", directory(&repb.OutputDirectory{TreeDigest: whole.Proto(), RootDirectoryDigest: x.Proto()}), action.ErrInvalid},
		{"root that is no Directory", directory(&repb.OutputDirectory{RootDirectoryDigest: x.Proto()}), action.ErrInvalid},
		{"Tree of terabytes", directory(&repb.OutputDirectory{TreeDigest: &repb.Digest{Hash: x.Hash(), SizeBytes: 1 << 42}}), blob.ErrTooLarge},
		{"inline contents of another digest", &repb.ActionResult{StdoutRaw: []byte("y"), StdoutDigest: x.Proto()}, action.ErrInvalid},
		{"too large", &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: string(make([]byte, 5<<20))}}, blob.ErrTooLarge},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := newCache(t, s).Put(t.Context(), key(), tc.r); !errors.Is(err, tc.want) {
				t.Errorf("Put: %v, want %v", err, tc.want)
			}
			if s.entries() != 0 {
				t.Error("Put made an entry")
			}
		})
	}
}

func TestPut_outlines_contents(t *testing.T) {
	s := newFakeStore(t)
	c := newCache(t, s)
	out := digest.Of(digest.SHA256, []byte("contents"))
	r := &repb.ActionResult{
		OutputFiles: []*repb.OutputFile{{Path: "a", Digest: out.Proto(), Contents: []byte("contents")}},
		StdoutRaw:   []byte("printed"),
	}
	given := proto.CloneOf(r)
	if err := c.Put(t.Context(), key(), r); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(given, r, protocmp.Transform()); diff != "" {
		t.Errorf("Put changed what it was given (-before +after)\n%s", diff)
	}
	got, err := c.Get(t.Context(), key())
	if err != nil {
		t.Fatal(err)
	}
	stdout := digest.Of(digest.SHA256, []byte("printed"))
	want := &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "a", Digest: out.Proto()}}, StdoutDigest: stdout.Proto()}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if s.bytes(out) != "contents" || s.bytes(stdout) != "printed" {
		t.Error("the contents are no blobs")
	}
}

func BenchmarkCache(b *testing.B) {
	s := newFakeStore(b)
	c, err := action.New(action.Options{Store: s, Entries: s})
	if err != nil {
		b.Fatal(err)
	}
	r := &repb.ActionResult{
		OutputFiles:  []*repb.OutputFile{{Path: "a/b/c.o", Digest: s.put([]byte("o")).Proto()}, {Path: "a/b/c.d", Digest: s.put([]byte("d")).Proto()}},
		StderrDigest: s.put([]byte("warning")).Proto(),
	}
	b.Run("Put", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := c.Put(b.Context(), key(), r); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Get", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := c.Get(b.Context(), key()); err != nil {
				b.Fatal(err)
			}
		}
	})
}
