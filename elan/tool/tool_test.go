package tool_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tool"
)

func newStore(t testing.TB) *mem.Store {
	t.Helper()
	s, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t testing.TB, s blob.Store, data string) digest.Digest {
	t.Helper()
	d, err := blob.PutBytes(t.Context(), s, digest.SHA256, []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func putMessage(t testing.TB, s blob.Store, m proto.Message) digest.Digest {
	t.Helper()
	d, err := blob.PutMessage(t.Context(), s, digest.SHA256, m)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestParseDigest(t *testing.T) {
	d := digest.Of(digest.SHA256, []byte("hello"))
	b := digest.Of(digest.BLAKE3, []byte("hello"))
	for _, tc := range []struct {
		name, in string
		want     digest.Digest
		err      string // a part of it, where want is zero
	}{
		{name: "slash", in: d.Hash() + "/5", want: d},
		{name: "dash", in: d.Hash() + "-5", want: d},
		{name: "colon", in: d.Hash() + ":5", want: d},
		{name: "function and colon", in: "sha256:" + d.Hash() + "/5", want: d},
		{name: "function and slash", in: "blake3/" + b.Hash() + "/5", want: b},
		{name: "function and dashes", in: "blake3-" + b.Hash() + "-5", want: b},
		{name: "the subject of a violation", in: "blobs/" + d.Hash() + "/5", want: d},
		{name: "the end of a resource name", in: "/blobs/blake3/" + b.Hash() + "/5", want: b},
		{name: "space around", in: " " + d.Hash() + "/5\n", want: d},
		{name: "capitals", in: "SHA256:" + strings.ToUpper(d.Hash()) + "/5", want: d},
		{name: "sha1", in: digest.Of(digest.SHA1, []byte("hello")).Hash() + "/5", want: digest.Of(digest.SHA1, []byte("hello"))},
		{name: "an instance's", in: d.In(digest.SpaceOf("i")).String(), want: d.In(digest.SpaceOf("i"))},
		{name: "no space", in: d.String() + "@i", err: "space \"i\""},
		{name: "empty", in: "", err: "is empty"},
		{name: "no size", in: d.Hash(), err: "has no size"},
		{name: "function and no size", in: "sha256:" + d.Hash(), err: "has no size"},
		{name: "size first", in: "5/" + d.Hash(), err: "for a size in bytes"},
		{name: "negative", in: d.Hash() + "/-5", err: "names a digest function"},
		{name: "fractional", in: d.Hash() + "/5.5", err: `has "5.5" for a size`},
		{name: "unknown function", in: "md5:" + d.Hash() + "/5", err: `names a digest function "md5"`},
		{name: "the wrong function", in: "sha1:" + d.Hash() + "/5", err: "a sha1 hash has 40"},
		{name: "too short a hash", in: "abcdef/5", err: "6 hexadecimal digits, which belongs to no"},
		{name: "not hexadecimal", in: strings.Repeat("x", 64) + "/5", err: "want lower-case hexadecimal"},
		{name: "too many parts", in: "a/b/c/d", err: "too many parts"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := tool.ParseDigest(tc.in)
			if got != tc.want || (err == nil) != (tc.err == "") {
				t.Fatalf("ParseDigest(%q) = %v, %v; want %v", tc.in, got, err, tc.want)
			}
			if err != nil && (!errors.Is(err, digest.ErrInvalid) || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("ParseDigest(%q): %v, want ErrInvalid with %q", tc.in, err, tc.err)
			}
		})
	}
}

// FuzzParseDigest: what is read is printed so that it is read again.
func FuzzParseDigest(f *testing.F) {
	f.Add("sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855/0")
	f.Add("blobs/AA-5:3")
	f.Add("-:/")
	f.Add("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855/0@00112233445566778899aabbccddeeff")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := tool.ParseDigest(text)
		if err != nil {
			if !errors.Is(err, digest.ErrInvalid) || !d.IsZero() {
				t.Fatalf("%v, %v", d, err)
			}
			return
		}
		if again, err := tool.ParseDigest(d.String()); err != nil || again != d {
			t.Fatalf("%q is %v, and that is %v, %v", text, d, again, err)
		}
	})
}

// listing is what is at path: names, kinds, contents.
func listing(t testing.TB, root string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		switch {
		case e.IsDir():
			got[name] = "dir"
		case e.Type()&fs.ModeSymlink != 0:
			got[name], err = os.Readlink(path)
		default:
			info, infoErr := e.Info()
			data, readErr := os.ReadFile(path)
			err = errors.Join(infoErr, readErr)
			got[name] = string(data)
			if err == nil && info.Mode()&0o100 != 0 {
				got[name] += " (executable)"
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func write(t testing.TB, path, data string, mode fs.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), mode); err != nil {
		t.Fatal(err)
	}
}

// TestPut_and_FetchTree: what goes in comes out, for each digest function.
func TestPut_and_FetchTree(t *testing.T) {
	src := t.TempDir()
	write(t, src+"/a/b/file", "contents", 0o644)
	write(t, src+"/a/run", "#!/bin/sh", 0o755)
	write(t, src+"/again", "contents", 0o600)
	write(t, src+"/nothing", "", 0o644)
	if err := os.Mkdir(src+"/hollow", 0o755); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"link": "a/b", "broken": "/nowhere/at all"} {
		if err := os.Symlink(target, filepath.Join(src, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, fn := range digest.Functions() {
		t.Run(fn.String(), func(t *testing.T) {
			s := newStore(t)
			d, err := tool.Put(t.Context(), s, fn, src)
			if err != nil {
				t.Fatal(err)
			}
			again, err := tool.Put(t.Context(), s, fn, src)
			if err != nil || again != d || d.Function() != fn {
				t.Errorf("put again: %v, %v, want %v", again, err, d)
			}
			out := filepath.Join(t.TempDir(), "out")
			if err := tool.FetchTree(t.Context(), s, d, out); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(listing(t, src), listing(t, out)); diff != "" {
				t.Errorf("(-in +out)\n%s", diff)
			}
			if left, err := os.ReadDir(filepath.Dir(out)); err != nil || len(left) != 1 {
				t.Errorf("beside it there is %v, %v", left, err)
			}
		})
	}
}

func TestPut_refuses(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/bad\xff", "x", 0o644)
	if _, err := tool.Put(t.Context(), newStore(t), digest.SHA256, dir); err == nil || !strings.Contains(err.Error(), "not UTF-8") {
		t.Errorf("a name that is not UTF-8: %v", err)
	}
	if _, err := tool.Put(t.Context(), newStore(t), digest.SHA256, "/dev/null"); err == nil || !strings.Contains(err.Error(), "want files, directories and symlinks") {
		t.Errorf("a device: %v", err)
	}
	if _, err := tool.Put(t.Context(), newStore(t), digest.SHA256, dir+"/absent"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an absent file: %v", err)
	}
}

// TestPut_of_a_changing_file: nothing wrong gets in.
func TestPut_of_a_changing_file(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "before", 0o644)
	s := newStore(t)
	changing := blobtest.Faulty{Store: s, Fault: func(op blobtest.Op, _ digest.Digest) error {
		if op == blobtest.OpFind { // when it has been hashed
			return os.WriteFile(path, []byte("AFTER!"), 0o600)
		}
		return nil
	}}
	if _, err := tool.Put(t.Context(), changing, digest.SHA256, path); err == nil || !strings.Contains(err.Error(), "changed while it was read") {
		t.Errorf("%v, want that it changed", err)
	}
	for _, data := range []string{"before", "AFTER!"} {
		d := digest.Of(digest.SHA256, []byte(data))
		if missing, err := s.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 {
			t.Errorf("%q is there: %v", data, err)
		}
	}
}

func TestPutStream(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	s := newStore(t)
	data := blobtest.Random(1, 3<<20)
	d, err := tool.PutStream(t.Context(), s, digest.BLAKE3, bytes.NewReader(data))
	if err != nil || d != digest.Of(digest.BLAKE3, data) {
		t.Fatalf("%v, %v", d, err)
	}
	var out bytes.Buffer
	if err := tool.Copy(t.Context(), s, d, &out); err != nil || !bytes.Equal(out.Bytes(), data) {
		t.Errorf("Copy: %d bytes, %v", out.Len(), err)
	}
	if left, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(left) != 0 {
		t.Errorf("%v remains, %v", left, err)
	}
}

// lying is a store whose blobs have other bytes than their digests say.
type lying struct{ blob.Store }

func (l lying) Open(ctx context.Context, d digest.Digest, off int64) (io.ReadCloser, error) {
	r, err := l.Store.Open(ctx, d, off)
	if err != nil || d.Size() != 3 {
		return r, err
	}
	return io.NopCloser(strings.NewReader("no!")), nil
}

func TestFetch_whole_or_not_at_all(t *testing.T) {
	s := newStore(t)
	good, bad := put(t, s, "good"), put(t, s, "bad")
	absent := digest.Of(digest.SHA256, []byte("absent"))
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	write(t, path, "as it was", 0o644)
	for d, want := range map[digest.Digest]error{bad: blob.ErrCorrupt, absent: blob.ErrNotFound} {
		if err := tool.Fetch(t.Context(), lying{s}, d, path); !errors.Is(err, want) {
			t.Errorf("Fetch of %s: %v, want %v", d, err, want)
		}
		if diff := cmp.Diff(map[string]string{"file": "as it was"}, listing(t, dir)); diff != "" {
			t.Errorf("after that (-want +got)\n%s", diff)
		}
	}
	if err := tool.Fetch(t.Context(), lying{s}, good, path); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{"file": "good"}, listing(t, dir)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if err := tool.Fetch(t.Context(), s, good, dir); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Errorf("Fetch over a directory: %v", err)
	}
}

func TestFetchTree_whole_or_not_at_all(t *testing.T) {
	s := newStore(t)
	node := func(name string, d digest.Digest) *repb.FileNode {
		return &repb.FileNode{Name: name, Digest: d.Proto()}
	}
	absent := digest.Of(digest.SHA256, []byte("absent"))
	good := putMessage(t, s, &repb.Directory{Files: []*repb.FileNode{node("f", put(t, s, "good"))}})
	for _, tc := range []struct {
		name string
		d    digest.Digest
		want error
	}{
		{"a corrupt file", putMessage(t, s, &repb.Directory{Files: []*repb.FileNode{node("a", put(t, s, "good")), node("b", put(t, s, "bad"))}}), blob.ErrCorrupt},
		{"an absent file", putMessage(t, s, &repb.Directory{Files: []*repb.FileNode{node("a", absent)}}), blob.ErrNotFound},
		{"an absent directory", putMessage(t, s, &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "d", Digest: absent.Proto()}}}), blob.ErrNotFound},
		{"an absent root", absent, blob.ErrNotFound},
		{"no directory", put(t, s, "text that is nothing"), blob.ErrMalformed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := tool.FetchTree(t.Context(), lying{s}, tc.d, filepath.Join(dir, "out")); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
			if got := listing(t, dir); len(got) != 0 {
				t.Errorf("%v remains", got)
			}
		})
	}
	dir := t.TempDir()
	if err := tool.FetchTree(t.Context(), s, good, dir); err != nil {
		t.Errorf("into an empty directory: %v", err)
	}
	if err := tool.FetchTree(t.Context(), s, good, dir); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("into one that is not empty: %v", err)
	}
	if diff := cmp.Diff(map[string]string{"f": "good"}, listing(t, dir)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestFetchTree_of_a_Tree_message(t *testing.T) {
	s := newStore(t)
	inner := &repb.Directory{Files: []*repb.FileNode{{
		Name: "f", Digest: put(t, s, "inside").Proto(),
		NodeProperties: &repb.NodeProperties{UnixMode: wrapperspb.UInt32(0o741), Mtime: timestamppb.New(time.Unix(1e9, 0))},
	}}}
	innerDigest, _, err := digest.OfMessage(digest.SHA256, inner)
	if err != nil {
		t.Fatal(err)
	}
	root := &repb.Directory{
		Directories: []*repb.DirectoryNode{{Name: "one", Digest: innerDigest.Proto()}, {Name: "two", Digest: innerDigest.Proto()}},
		Symlinks:    []*repb.SymlinkNode{{Name: "out", Target: "/etc"}},
	}
	d := putMessage(t, s, &repb.Tree{Root: root, Children: []*repb.Directory{inner}})
	out := filepath.Join(t.TempDir(), "out")
	if err := tool.FetchTree(t.Context(), s, d, out); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"one": "dir", "two": "dir", "one/f": "inside (executable)", "two/f": "inside (executable)", "out": "/etc"}
	if diff := cmp.Diff(want, listing(t, out)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	info, err := os.Stat(out + "/one/f")
	if err != nil || info.Mode().Perm() != 0o741 || !info.ModTime().Equal(time.Unix(1e9, 0)) {
		t.Errorf("%v, %v, want the mode and the time of its properties", info, err)
	}
}

// TestFetchTree_bounded: a few Directories that would be billions of files.
func TestFetchTree_bounded(t *testing.T) {
	s := newStore(t)
	d := putMessage(t, s, &repb.Directory{})
	for range 24 {
		d = putMessage(t, s, &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "a", Digest: d.Proto()}, {Name: "b", Digest: d.Proto()}}})
	}
	dir := t.TempDir()
	if err := tool.FetchTree(t.Context(), s, d, dir+"/out"); !errors.Is(err, blob.ErrTooLarge) {
		t.Errorf("%v, want ErrTooLarge", err)
	}
	if got := listing(t, dir); len(got) != 0 {
		t.Errorf("%v remains", got)
	}
}
