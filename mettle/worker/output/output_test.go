//go:build linux

package output_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker/output"
)

func TestCollector_Collect_files(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		f.write(t, map[string]string{"w/a": "A", "x:w/b": "A", "w/empty": "", "up": "U", "w/not-an-output": "N"})
		got := f.mustCollect(t, &repb.Command{WorkingDirectory: "w", OutputPaths: []string{"../up", "a", "b", "empty", "missing", "a/below-a-file"}})
		want := &repb.ActionResult{OutputFiles: []*repb.OutputFile{
			{Path: "../up", Digest: f.digest("U")},
			{Path: "a", Digest: f.digest("A")},
			{Path: "b", Digest: f.digest("A"), IsExecutable: true},
			{Path: "empty", Digest: f.digest("")},
		}}
		if diff := cmp.Diff(want, got.Result, protocmp.Transform()); diff != "" {
			t.Errorf("result (-want +got):\n%s", diff)
		}
		for _, s := range []string{"U", "A"} {
			if data := f.read(t, f.digest(s)); string(data) != s {
				t.Errorf("the store has %q, want %q", data, s)
			}
		}
		if missing, err := f.store.FindMissing(t.Context(), []digest.Digest{digest.Of(f.fn, []byte("N"))}); err != nil || len(missing) != 1 {
			t.Errorf("what is no output was stored: %v", err)
		}
		if c, ok := f.store.(*counting); ok && (c.finds.Load() != 2 || c.creates.Load() != 2) {
			t.Errorf("%d questions, %d uploads, want 1 and 2", c.finds.Load()-1, c.creates.Load())
		}
	})
}

func TestCollector_Collect_uploadsOnlyWhatIsMissing(t *testing.T) {
	store := remote(t).(*counting)
	f := newFixture(t, store, output.Options{})
	f.write(t, map[string]string{"a": "A", "b": "B"})
	if _, err := blob.PutBytes(t.Context(), store.Store, f.fn, []byte("A")); err != nil {
		t.Fatal(err)
	}
	f.mustCollect(t, &repb.Command{OutputPaths: []string{"a", "b"}})
	if store.finds.Load() != 1 || store.creates.Load() != 1 {
		t.Errorf("%d questions, %d uploads, want 1 and 1", store.finds.Load(), store.creates.Load())
	}
}

// unknownFormat is one that is yet to come: the specification has it read as
// TREE_ONLY.
const unknownFormat = repb.Command_OutputDirectoryFormat(77)

func TestCollector_Collect_directory(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		same := &repb.Directory{Files: []*repb.FileNode{{Name: "leaf", Digest: f.digest("L")}}}
		one := &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "same", Digest: f.messageDigest(t, same)}}}
		two := &repb.Directory{
			Files:       []*repb.FileNode{{Name: "other", Digest: f.digest("O")}},
			Directories: []*repb.DirectoryNode{{Name: "same", Digest: f.messageDigest(t, same)}},
		}
		root := &repb.Directory{
			Files: []*repb.FileNode{{Name: "run", Digest: f.digest("R"), IsExecutable: true}, {Name: "z", Digest: f.digest("Z")}},
			Directories: []*repb.DirectoryNode{
				{Name: "none", Digest: f.digest("")}, {Name: "one", Digest: f.messageDigest(t, one)}, {Name: "two", Digest: f.messageDigest(t, two)},
			},
			Symlinks: []*repb.SymlinkNode{{Name: "link", Target: "z"}},
		}
		// Each once, parents first.
		wantTree := &repb.Tree{Root: root, Children: []*repb.Directory{two, one, same, {}}}
		for _, format := range []repb.Command_OutputDirectoryFormat{repb.Command_TREE_ONLY, repb.Command_DIRECTORY_ONLY, repb.Command_TREE_AND_DIRECTORY, unknownFormat} {
			// Anew each time: the store takes the files over.
			if err := os.RemoveAll(filepath.Join(f.root, "d")); err != nil {
				t.Fatal(err)
			}
			f.write(t, map[string]string{
				"d/z": "Z", "x:d/run": "R", "d/link": "-> z", "d/one/same/leaf": "L", "d/two/same/leaf": "L", "d/two/other": "O",
			})
			if err := os.Mkdir(filepath.Join(f.root, "d/none"), 0o755); err != nil { //nolint:gosec // as actions do
				t.Fatal(err)
			}
			got := f.mustCollect(t, &repb.Command{OutputPaths: []string{"d"}, OutputDirectoryFormat: format})
			want := &repb.OutputDirectory{Path: "d"}
			if format != repb.Command_DIRECTORY_ONLY {
				want.TreeDigest, want.IsTopologicallySorted = f.messageDigest(t, wantTree), true
			}
			if format != repb.Command_TREE_ONLY && format != unknownFormat {
				want.RootDirectoryDigest = f.messageDigest(t, root)
			}
			if diff := cmp.Diff([]*repb.OutputDirectory{want}, got.Result.OutputDirectories, protocmp.Transform()); diff != "" {
				t.Fatalf("%v (-want +got):\n%s", format, diff)
			}
		}
		tree := &repb.Tree{}
		if err := proto.Unmarshal(f.read(t, f.messageDigest(t, wantTree)), tree); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(wantTree, tree, protocmp.Transform()); diff != "" {
			t.Errorf("tree (-want +got):\n%s", diff)
		}
		for _, m := range []proto.Message{root, one, two, same} {
			f.read(t, f.messageDigest(t, m))
		}
	})
}

func TestCollector_Collect_wholeWorkingDirectory(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		f.write(t, map[string]string{"a": "A"})
		for _, c := range []*repb.Command{{OutputPaths: []string{""}}, {OutputDirectories: []string{""}}} {
			got := f.mustCollect(t, c)
			if len(got.Result.OutputDirectories) != 1 || got.Result.OutputDirectories[0].Path != "" {
				t.Errorf("result %v", got.Result)
			}
		}
	})
}

func TestCollector_Collect_symlinks(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		f.write(t, map[string]string{"file": "F", "dir/x": "X", "to-file": "-> file", "to-dir": "-> dir", "dangling": "-> none", "outside": "-> /etc", "via/x": "-> ../dir/x"})
		names := []string{"dangling", "outside", "to-dir", "to-dir/x", "to-file", "via/x"}
		link := func(p, target string) *repb.OutputSymlink { return &repb.OutputSymlink{Path: p, Target: target} }
		fileLinks := []*repb.OutputSymlink{link("dangling", "none"), link("outside", "/etc"), link("to-file", "file"), link("via/x", "../dir/x")}
		dirLinks := []*repb.OutputSymlink{link("to-dir", "dir")}
		want := &repb.ActionResult{
			OutputFiles:             []*repb.OutputFile{{Path: "to-dir/x", Digest: f.digest("X")}},
			OutputFileSymlinks:      fileLinks,
			OutputDirectorySymlinks: dirLinks,
		}
		old := f.mustCollect(t, &repb.Command{OutputFiles: names})
		if diff := cmp.Diff(want, old.Result, protocmp.Transform()); diff != "" {
			t.Errorf("by output_files (-want +got):\n%s", diff)
		}
		want.OutputSymlinks = []*repb.OutputSymlink{fileLinks[0], fileLinks[1], dirLinks[0], fileLinks[2], fileLinks[3]}
		now := f.mustCollect(t, &repb.Command{OutputPaths: names})
		if diff := cmp.Diff(want, now.Result, protocmp.Transform()); diff != "" {
			t.Errorf("by output_paths (-want +got):\n%s", diff)
		}
	})
}

func TestCollector_Collect_nothingOutsideAndNothingSpecial(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		if err := os.WriteFile(filepath.Join(filepath.Dir(f.root), "secret"), []byte("S"), 0o600); err != nil {
			t.Fatal(err)
		}
		f.write(t, map[string]string{"up": "-> ..", "abs": "-> " + filepath.Dir(f.root), "loop": "-> loop", "d/ok": "O", "proc": "-> /proc/self/root"})
		for _, p := range []string{"fifo", "d/fifo"} {
			if err := unix.Mkfifo(filepath.Join(f.root, p), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		sock, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(sock)
		t.Chdir(f.root) // the path of a socket is short
		if err := unix.Bind(sock, &unix.SockaddrUnix{Name: "socket"}); err != nil {
			t.Fatal(err)
		}
		got := f.mustCollect(t, &repb.Command{OutputPaths: []string{"abs/secret", "d", "fifo", "loop/x", "proc/etc/passwd", "socket", "up/secret"}})
		if r := got.Result; len(r.OutputFiles) != 0 || len(r.OutputSymlinks) != 0 || len(r.OutputDirectories) != 1 {
			t.Errorf("result %v, want the directory alone", r)
		}
		for _, name := range []string{"abs/secret", "d/fifo", "fifo", "loop/x", "proc/etc/passwd", "socket", "up/secret"} {
			if !slices.ContainsFunc(got.Notes, func(n string) bool { return strings.Contains(n, fmt.Sprintf("%q", name)) }) {
				t.Errorf("no note about %s: %q", name, got.Notes)
			}
		}
	})
}

func TestCollector_Collect_overlapping(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		f.write(t, map[string]string{"x:d/run": "R", "x:e": "E"})
		if err := os.Link(filepath.Join(f.root, "e"), filepath.Join(f.root, "e2")); err != nil {
			t.Fatal(err)
		}
		got := f.mustCollect(t, &repb.Command{OutputPaths: []string{"d", "d/run", "e", "e2"}})
		for _, o := range got.Result.OutputFiles {
			if !o.IsExecutable {
				t.Errorf("%s is not executable", o.Path)
			}
		}
		again := f.mustCollect(t, &repb.Command{OutputPaths: []string{"missing"}})
		if len(again.Result.OutputFiles) != 0 || len(got.Result.OutputFiles) != 3 {
			t.Errorf("output files %v", got.Result.OutputFiles)
		}
	})
}

func TestCollector_Collect_properties(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		f.write(t, map[string]string{"x:a": "A", "d/b": "B", "d/l": "-> b", "d/sub/c": "C", "link": "-> a"})
		mtime := time.Unix(1000, 5)
		for _, p := range []string{"a", "d/b", "d/l", "d/sub", "d", "link"} {
			if err := unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(f.root, p), []unix.Timespec{{Sec: 1000, Nsec: 5}, {Sec: 1000, Nsec: 5}}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				t.Fatal(err)
			}
		}
		got := f.mustCollect(t, &repb.Command{OutputPaths: []string{"a", "d", "link"}, OutputNodeProperties: []string{"mtime", "unix_mode"}})
		want := &repb.NodeProperties{Mtime: timestamppb.New(mtime), UnixMode: wrapperspb.UInt32(0o755)}
		if diff := cmp.Diff(want, got.Result.OutputFiles[0].NodeProperties, protocmp.Transform()); diff != "" {
			t.Errorf("a (-want +got):\n%s", diff)
		}
		tree := &repb.Tree{}
		if err := proto.Unmarshal(f.read(t, got.Result.OutputDirectories[0].TreeDigest), tree); err != nil {
			t.Fatal(err)
		}
		if m := tree.Root.Files[0].NodeProperties; !m.GetMtime().AsTime().Equal(mtime) || m.GetUnixMode().GetValue() != 0o644 || !tree.Root.NodeProperties.GetMtime().AsTime().Equal(mtime) {
			t.Errorf("tree %v", tree)
		}
		// Symlinks have their own, not their targets'; directories have them at every level.
		for what, p := range map[string]*repb.NodeProperties{
			"link": got.Result.OutputSymlinks[0].NodeProperties, "d/l": tree.Root.Symlinks[0].NodeProperties, "d/sub": tree.Children[0].NodeProperties,
		} {
			if mode := p.GetUnixMode().GetValue(); !p.GetMtime().AsTime().Equal(mtime) || what != "d/sub" && mode != 0o777 || what == "d/sub" && mode != 0o755 {
				t.Errorf("%s: %v", what, p)
			}
		}
		// One that was asked for comes alone, and none unasked.
		got = f.mustCollect(t, &repb.Command{OutputPaths: []string{"d/sub/c", "link"}, OutputNodeProperties: []string{"mtime"}})
		if p := got.Result.OutputFiles[0].NodeProperties; p.GetMtime() == nil || p.GetUnixMode() != nil {
			t.Errorf("mtime alone: %v", p)
		}
		got = f.mustCollect(t, &repb.Command{OutputPaths: []string{"link"}})
		if p := got.Result.OutputSymlinks[0].NodeProperties; p != nil {
			t.Errorf("unasked: %v", p)
		}
	})
}

func TestCollector_Collect_unusable(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		f.write(t, map[string]string{"file": "F", "dir/x": "X", "bad/\xff": "B", "badlink/l": "-> \xff"})
		for name, tc := range map[string]struct {
			c    *repb.Command
			want string
		}{
			"directory as file": {&repb.Command{OutputFiles: []string{"dir", "file"}}, "is a directory"},
			"file as directory": {&repb.Command{OutputFiles: []string{"file"}, OutputDirectories: []string{"dir/x"}}, "is a file"},
			"name":              {&repb.Command{OutputPaths: []string{"bad", "file"}}, "not UTF-8"},
			"target":            {&repb.Command{OutputPaths: []string{"badlink", "file"}}, "not UTF-8"},
		} {
			got, err := f.collect(t, tc.c)
			if !errors.Is(err, output.ErrUnusable) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%s: %v, want ErrUnusable about %q", name, err, tc.want)
			}
			if got == nil || len(got.Result.OutputFiles) != 1 {
				t.Errorf("%s: %v, want the other output all the same", name, got)
			}
		}
	})
}

func TestCollector_Collect_bounds(t *testing.T) {
	f := newFixture(t, remote(t), output.Options{MaxEntries: 20, MaxDepth: 5, MaxTreeBytes: 1000})
	files := map[string]string{"deep/1/2/3/4/5/6/x": "", "few/" + strings.Repeat("a", 250): "a"}
	for i := range 21 {
		files[fmt.Sprint("many/", i)] = ""
	}
	for i := range 4 {
		files[fmt.Sprint("large/", strings.Repeat("a", 250), i)] = "a"
	}
	f.write(t, files)
	for name, want := range map[string]string{"deep": "levels deep", "many": "over 20 files", "large": "over 1000 bytes", "few": ""} {
		_, err := f.collect(t, &repb.Command{OutputPaths: []string{name}})
		if want == "" && err != nil || want != "" && (!errors.Is(err, output.ErrUnusable) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
}

func TestCollector_Collect_streams(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		dir := filepath.Dir(f.root)
		small, large := "small", strings.Repeat("large ", 10_000)
		for name, data := range map[string]string{"out": small, "err": large} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got, err := f.collector.Collect(t.Context(), output.Request{
			Root: f.root, Command: &repb.Command{}, Function: f.fn, Stdout: filepath.Join(dir, "out"), Stderr: filepath.Join(dir, "err"),
			StdoutBytes: int64(len(small)), StderrBytes: int64(len(large)),
		})
		if err != nil {
			t.Fatal(err)
		}
		want := &repb.ActionResult{StdoutRaw: []byte(small), StdoutDigest: f.digest(small), StderrDigest: f.digest(large)}
		if diff := cmp.Diff(want, got.Result, protocmp.Transform()); diff != "" {
			t.Errorf("result (-want +got):\n%s", diff)
		}
		if string(f.read(t, want.StdoutDigest)) != small || string(f.read(t, want.StderrDigest)) != large {
			t.Error("the store has other bytes")
		}
	})
}

func TestCollector_Collect_unreadable(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("root reads everything")
	}
	each(t, func(t *testing.T, f *fixture) {
		f.write(t, map[string]string{"a": "A", "d/b": "B"})
		for _, p := range []string{"a", "d/b"} {
			if err := os.Chmod(filepath.Join(f.root, p), 0); err != nil {
				t.Fatal(err)
			}
		}
		if got := f.mustCollect(t, &repb.Command{OutputPaths: []string{"a"}}); len(got.Result.OutputFiles) != 0 || len(got.Notes) != 1 {
			t.Errorf("collected %v", got)
		}
		if _, err := f.collect(t, &repb.Command{OutputPaths: []string{"d"}}); !errors.Is(err, output.ErrUnusable) {
			t.Errorf("Collect: %v, want ErrUnusable: a directory with a hole in it", err)
		}
	})
}
