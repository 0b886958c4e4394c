//go:build linux

package inputroot_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tree"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// stores are a store elsewhere, and one on the local disk by each policy.
func stores() map[string]func(t testing.TB) (blob.Store, inputroot.LinkPolicy) {
	return map[string]func(t testing.TB) (blob.Store, inputroot.LinkPolicy){
		"remote": func(t testing.TB) (blob.Store, inputroot.LinkPolicy) {
			s, err := mem.New(mem.Options{})
			if err != nil {
				t.Fatal(err)
			}
			return s, inputroot.Link
		},
		"copy":  func(t testing.TB) (blob.Store, inputroot.LinkPolicy) { return fileStore(t), inputroot.Copy },
		"link":  func(t testing.TB) (blob.Store, inputroot.LinkPolicy) { return fileStore(t), inputroot.Link },
		"audit": func(t testing.TB) (blob.Store, inputroot.LinkPolicy) { return fileStore(t), inputroot.LinkAndAudit },
	}
}

func fileStore(t testing.TB) blob.Store {
	t.Helper()
	s, err := file.New(file.Options{Dir: filepath.Join(t.TempDir(), "store")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

type fixture struct {
	store   blob.Store
	builder *inputroot.Builder
	dir     string
}

func newFixture(t testing.TB, store blob.Store, o inputroot.Options) *fixture {
	t.Helper()
	o.Store = store
	b, err := inputroot.New(o)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{store: store, builder: b, dir: filepath.Join(t.TempDir(), "root")}
	t.Cleanup(func() {
		if err := inputroot.Remove(f.dir); err != nil {
			t.Error(err)
		}
	})
	return f
}

func (f *fixture) put(t testing.TB, data string) *repb.Digest {
	t.Helper()
	d, err := blob.PutBytes(t.Context(), f.store, digest.SHA256, []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	return d.Proto()
}

func (f *fixture) putMessage(t testing.TB, m proto.Message) *repb.Digest {
	t.Helper()
	d, err := blob.PutMessage(t.Context(), f.store, digest.SHA256, m)
	if err != nil {
		t.Fatal(err)
	}
	return d.Proto()
}

func (f *fixture) build(t testing.TB, root *repb.Digest, dirs ...string) (*inputroot.Root, error) {
	t.Helper()
	d, err := digest.FromProto(digest.SHA256, root)
	if err != nil {
		t.Fatal(err)
	}
	return f.builder.Build(t.Context(), inputroot.Request{Dir: f.dir, Digest: d, Directories: dirs})
}

// list is what is in dir, a line each.
func list(t testing.TB, dir string) []string {
	t.Helper()
	lines := []string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		st, err := e.Info()
		if err != nil {
			return err
		}
		line := fmt.Sprint(st.Mode(), " ", strings.TrimPrefix(path, dir+"/"))
		switch {
		case st.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += " = " + string(data)
		case st.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + target
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestBuilder_Build(t *testing.T) {
	for name, newStore := range stores() {
		t.Run(name, func(t *testing.T) {
			store, policy := newStore(t)
			f := newFixture(t, store, inputroot.Options{Policy: policy})
			same := f.put(t, "same")
			leaf := f.putMessage(t, &repb.Directory{Files: []*repb.FileNode{{Name: "leaf", Digest: same}}})
			root, err := f.build(t, f.putMessage(t, &repb.Directory{
				Files: []*repb.FileNode{
					{Name: "a", Digest: same},
					{Name: "empty", Digest: digest.Empty(digest.SHA256).Proto()},
					{Name: "tool", Digest: f.put(t, "tool"), IsExecutable: true},
					{Name: "with-mode", Digest: same, NodeProperties: &repb.NodeProperties{UnixMode: wrapperspb.UInt32(0o4640)}},
					{Name: "with-mtime", Digest: same, NodeProperties: &repb.NodeProperties{Mtime: timestamppb.New(time.Unix(86400, 5))}},
				},
				Directories: []*repb.DirectoryNode{
					{Name: "d1", Digest: leaf},
					{Name: "d2", Digest: leaf},
					{Name: "none", Digest: digest.Empty(digest.SHA256).Proto()},
				},
				Symlinks: []*repb.SymlinkNode{{Name: "abs", Target: "/etc"}, {Name: "into", Target: "d1"}, {Name: "up", Target: "../.."}},
			}), "d1", "d1/made/x", "into/seen", "new/deep", "new/deep/er", "up/escaped", "abs/escaped")
			if err != nil {
				t.Fatal(err)
			}
			want := []string{
				"-r--r--r-- a = same",
				"Lrwxrwxrwx abs -> /etc",
				"drwxr-xr-x d1",
				"-r--r--r-- d1/leaf = same",
				"drwxr-xr-x d1/made",
				"drwxr-xr-x d1/made/x",
				"drwxr-xr-x d1/seen",
				"drwxr-xr-x d2",
				"-r--r--r-- d2/leaf = same",
				"-r--r--r-- empty = ",
				"Lrwxrwxrwx into -> d1",
				"drwxr-xr-x new",
				"drwxr-xr-x new/deep",
				"drwxr-xr-x new/deep/er",
				"drwxr-xr-x none",
				"-r-xr-xr-x tool = tool",
				"Lrwxrwxrwx up -> ../..",
				"-rw-r----- with-mode = same",
				"-r--r--r-- with-mtime = same",
			}
			if diff := cmp.Diff(want, list(t, f.dir)); diff != "" {
				t.Errorf("input root (-want +got):\n%s", diff)
			}
			if st, err := os.Stat(filepath.Join(f.dir, "with-mtime")); err != nil || !st.ModTime().Equal(time.Unix(86400, 5)) {
				t.Errorf("with-mtime was modified at %v", st.ModTime())
			}
			if siblings := list(t, filepath.Dir(f.dir)); slices.ContainsFunc(siblings, func(l string) bool { return strings.HasSuffix(l, " escaped") }) {
				t.Errorf("something was made outside: %q", siblings)
			}
			if _, err := os.Stat("/etc/escaped"); err == nil {
				t.Error("something was made in /etc")
			}
			inodes := map[string]string{}
			for _, name := range []string{"a", "d1/leaf", "d2/leaf", "with-mode", "with-mtime"} {
				st, err := os.Stat(filepath.Join(f.dir, name))
				if err != nil {
					t.Fatal(err)
				}
				for other, seen := range inodes {
					if o, err := os.Stat(filepath.Join(f.dir, other)); err == nil && os.SameFile(st, o) {
						t.Errorf("%s and %s are one file (%s)", name, other, seen)
					}
				}
				inodes[name] = st.Name()
			}
			if err := root.Audit(t.Context()); err != nil {
				t.Errorf("Audit: %v", err)
			}
			if err := inputroot.Remove(f.dir); err != nil {
				t.Errorf("Remove: %v", err)
			}
			if _, err := os.Lstat(f.dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("after Remove: %v", err)
			}
		})
	}
}

func TestBuilder_Build_missing(t *testing.T) {
	for name, newStore := range stores() {
		t.Run(name, func(t *testing.T) {
			store, policy := newStore(t)
			f := newFixture(t, store, inputroot.Options{Policy: policy})
			lost := func(s string) *repb.Digest { return digest.Of(digest.SHA256, []byte(s)).Proto() }
			files := &repb.Directory{Files: []*repb.FileNode{
				{Name: "1", Digest: lost("1")},
				{Name: "2", Digest: f.put(t, "2")},
				{Name: "3", Digest: lost("3"), NodeProperties: &repb.NodeProperties{UnixMode: wrapperspb.UInt32(0o600)}},
				{Name: "4", Digest: lost("1")},
			}}
			withDirs := proto.CloneOf(files)
			withDirs.Directories = []*repb.DirectoryNode{{Name: "5", Digest: lost("5")}, {Name: "6", Digest: f.putMessage(t, files)}}
			for _, tc := range []struct {
				name string
				root *repb.Digest
				want []string
			}{
				{"root", lost("root"), []string{"root"}},
				{"files", f.putMessage(t, files), []string{"1", "3"}},
				{"directories and files", f.putMessage(t, withDirs), []string{"1", "3", "5"}},
			} {
				t.Run(tc.name, func(t *testing.T) {
					_, err := f.build(t, tc.root)
					var missing *blob.MissingError
					if !errors.As(err, &missing) {
						t.Fatalf("Build: %v, want a MissingError", err)
					}
					var want, got []string
					for _, s := range tc.want {
						want = append(want, lost(s).Hash)
					}
					for _, d := range missing.Digests {
						got = append(got, d.Hash())
					}
					slices.Sort(want)
					slices.Sort(got)
					if diff := cmp.Diff(want, got); diff != "" {
						t.Errorf("missing (-want +got):\n%s", diff)
					}
					if err := inputroot.Remove(f.dir); err != nil {
						t.Fatal(err)
					}
				})
			}
		})
	}
}

func TestBuilder_Build_invalid(t *testing.T) {
	store, policy := stores()["remote"](t)
	f := newFixture(t, store, inputroot.Options{Policy: policy, MaxDepth: 10, MaxEntries: 1000})
	x := f.put(t, "x")
	for name, m := range map[string]proto.Message{
		"slash":                &repb.Directory{Files: []*repb.FileNode{{Name: "a/b", Digest: x}}},
		"dotdot":               &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "..", Digest: digest.Empty(digest.SHA256).Proto()}}},
		"unsorted":             &repb.Directory{Files: []*repb.FileNode{{Name: "b", Digest: x}, {Name: "a", Digest: x}}},
		"duplicate":            &repb.Directory{Files: []*repb.FileNode{{Name: "a", Digest: x}}, Symlinks: []*repb.SymlinkNode{{Name: "a", Target: "b"}}},
		"no digest":            &repb.Directory{Files: []*repb.FileNode{{Name: "a"}}},
		"long name":            &repb.Directory{Files: []*repb.FileNode{{Name: strings.Repeat("a", 300), Digest: x}}},
		"file above an output": &repb.Directory{Files: []*repb.FileNode{{Name: "out", Digest: x}}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := f.build(t, f.putMessage(t, m), "out/dir"); !errors.Is(err, tree.ErrInvalid) {
				t.Errorf("Build: %v, want tree.ErrInvalid", err)
			}
			if err := inputroot.Remove(f.dir); err != nil {
				t.Fatal(err)
			}
		})
	}
	if _, err := f.build(t, f.put(t, "\xffnot a message")); !errors.Is(err, blob.ErrMalformed) {
		t.Errorf("Build: %v, want blob.ErrMalformed", err)
	}
}

// A few small messages describe 2^40 directories, or very deep ones.
func TestBuilder_Build_bounds(t *testing.T) {
	store, policy := stores()["remote"](t)
	f := newFixture(t, store, inputroot.Options{Policy: policy, MaxDepth: 50, MaxEntries: 1000})
	diamond := f.putMessage(t, &repb.Directory{})
	chain := diamond
	var wide []*repb.FileNode
	for i := range 1001 {
		wide = append(wide, &repb.FileNode{Name: fmt.Sprintf("%04d", i), Digest: diamond})
	}
	for i := range 60 {
		if i < 40 {
			diamond = f.putMessage(t, &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "l", Digest: diamond}, {Name: "r", Digest: diamond}}})
		}
		chain = f.putMessage(t, &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "d", Digest: chain}}})
	}
	for name, root := range map[string]*repb.Digest{
		"diamonds": diamond, "chain": chain, "wide": f.putMessage(t, &repb.Directory{Files: wide}),
		// The longest way counts, not the shortest.
		"shortcut": f.putMessage(t, &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "long", Digest: chain}, {Name: "short", Digest: digest.Empty(digest.SHA256).Proto()}}}),
	} {
		start := time.Now()
		if _, err := f.build(t, root); !errors.Is(err, tree.ErrInvalid) || time.Since(start) > time.Minute {
			t.Errorf("%s: %v after %v, want tree.ErrInvalid at once", name, err, time.Since(start))
		}
		if err := inputroot.Remove(f.dir); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRoot_Audit(t *testing.T) {
	store, policy := stores()["audit"](t)
	f := newFixture(t, store, inputroot.Options{Policy: policy})
	root, err := f.build(t, f.putMessage(t, &repb.Directory{Files: []*repb.FileNode{{Name: "a", Digest: f.put(t, "a")}}}))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(f.dir, "a"), 0o666); err != nil { //nolint:gosec // what an action might do
		t.Fatal(err)
	}
	if err := root.Audit(t.Context()); !errors.Is(err, blob.ErrCorrupt) {
		t.Errorf("Audit: %v, want blob.ErrCorrupt", err)
	}
	d := digest.Of(digest.SHA256, []byte("a"))
	// A store that has the bytes elsewhere than in that file keeps them.
	if data, err := blob.ReadAll(t.Context(), store, d, 1); !errors.Is(err, blob.ErrNotFound) && (err != nil || string(data) != "a") {
		t.Errorf("after the audit the store has %q, %v; want what it had, or nothing", data, err)
	}
	if err := root.Audit(t.Context()); !errors.Is(err, blob.ErrCorrupt) {
		t.Errorf("another slot's audit: %v, want blob.ErrCorrupt", err)
	}
}

// wrong is a store on a bad network.
type wrong struct{ blob.Store }

func (w wrong) Open(ctx context.Context, d digest.Digest, off int64) (r io.ReadCloser, err error) {
	if r, err = w.Store.Open(ctx, d, off); d.Size() == 3 {
		return flipped{r}, err
	}
	return r, err
}

type flipped struct{ io.ReadCloser }

func (f flipped) Read(p []byte) (int, error) {
	n, err := f.ReadCloser.Read(p)
	for i := range n {
		p[i] ^= 1
	}
	return n, err
}

func TestBuilder_Build_verifiesWhatCameOverANetwork(t *testing.T) {
	store, policy := stores()["remote"](t)
	f := newFixture(t, wrong{store}, inputroot.Options{Policy: policy})
	if _, err := f.build(t, f.putMessage(t, &repb.Directory{Files: []*repb.FileNode{{Name: "a", Digest: f.put(t, "abc")}}})); !errors.Is(err, blob.ErrCorrupt) {
		t.Errorf("Build: %v, want blob.ErrCorrupt", err)
	}
}

// FuzzBuild holds that no Directory, whatever is in it, makes a file outside.
func FuzzBuild(f *testing.F) {
	for _, name := range []string{"a", "..", "../x", "/x", "a/../../x", ""} {
		data, err := proto.Marshal(&repb.Directory{
			Files:    []*repb.FileNode{{Name: name, Digest: digest.Empty(digest.SHA256).Proto()}},
			Symlinks: []*repb.SymlinkNode{{Name: "s", Target: name}},
		})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, "s/made")
	}
	store, err := mem.New(mem.Options{})
	if err != nil {
		f.Fatal(err)
	}
	b, err := inputroot.New(inputroot.Options{Store: store, MaxEntries: 100})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte, made string) {
		d, err := blob.PutBytes(t.Context(), store, digest.SHA256, data)
		if err != nil {
			t.Fatal(err)
		}
		if made = filepath.Clean("/" + made)[1:]; strings.IndexByte(made, 0) >= 0 {
			made = ""
		}
		base := t.TempDir()
		_, err = b.Build(t.Context(), inputroot.Request{Dir: filepath.Join(base, "root"), Digest: d, Directories: []string{made}})
		if got := list(t, base); slices.ContainsFunc(got, func(l string) bool {
			name := strings.Fields(l)[1]
			return name != "root" && !strings.HasPrefix(name, "root/")
		}) {
			t.Errorf("Build: %v, and outside of the root there is %q", err, got)
		}
	})
}
