//go:build linux

package inputroot_test

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

// slotFixture is what a slot has: a shelf, and a user of its own if there can be one.
type slotFixture struct {
	*fixture
	shelf *inputroot.Shelf
	owner inputroot.Owner
	root  *inputroot.Root
}

// eachOwner runs test with commands that have a user of their own, and with those
// that have not.
func eachOwner(t *testing.T, test func(t *testing.T, f *slotFixture)) {
	t.Helper()
	t.Run("user", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("only root can give commands a user of their own")
		}
		test(t, newSlot(t, inputroot.Link, inputroot.Owner{Set: true, UID: 65_001, GID: 65_001}))
	})
	t.Run("audit", func(t *testing.T) { test(t, newSlot(t, inputroot.LinkAndAudit, inputroot.Owner{})) })
}

func newSlot(t *testing.T, policy inputroot.LinkPolicy, owner inputroot.Owner) *slotFixture {
	t.Helper()
	f := &slotFixture{fixture: newFixture(t, fileStore(t), inputroot.Options{Policy: policy}), owner: owner}
	// Everyone may pass to the root, but not to the store and the shelf beside it.
	for dir := filepath.Dir(f.dir); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // see above
			t.Fatal(err)
		}
	}
	var err error
	if f.shelf, err = inputroot.NewShelf(filepath.Join(filepath.Dir(f.dir), "shelf"), owner); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.shelf.Close() })
	return f
}

func (f *slotFixture) build(t testing.TB, root *repb.Digest, dirs ...string) error {
	t.Helper()
	d, err := digest.FromProto(digest.SHA256, root)
	if err != nil {
		t.Fatal(err)
	}
	f.root, err = f.builder.Build(t.Context(), inputroot.Request{Dir: f.dir, Digest: d, Owner: f.owner, Shelf: f.shelf, Directories: dirs})
	return err
}

// run runs a shell command as an action runs, in the root.
func (f *slotFixture) run(t testing.TB, script string) {
	t.Helper()
	c := exec.CommandContext(t.Context(), "/bin/sh", "-c", script)
	c.Dir = f.dir
	if f.owner.Set {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(f.owner.UID), Gid: uint32(f.owner.GID)}} //nolint:gosec // small
	}
	if out, err := c.CombinedOutput(); err != nil {
		t.Logf("%s: %v: %s", script, err, out)
	}
}

func (f *slotFixture) remove(t testing.TB) {
	t.Helper()
	if err := removeAway(f.shelf, f.dir); err != nil {
		t.Fatalf("Remove: %v", err)
	}
	if _, err := os.Lstat(f.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("after Remove: %v", err)
	}
}

// needCtimes skips where the file system is not known to keep them, so that no root
// is kept.
func needCtimes(t *testing.T, dir string) {
	t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	switch fs.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC:
	default:
		t.Skipf("no input root is kept on a file system of type %#x", fs.Type)
	}
}

// inodes are those of all files below dir, and whether each is there once.
func inodes(t testing.TB, dir string) map[string]uint64 {
	t.Helper()
	all, names := make(map[string]uint64), make(map[uint64]string)
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			ino := inode(t, path)
			if other, again := names[ino]; again {
				t.Errorf("%s and %s are one inode", path, other)
			}
			all[strings.TrimPrefix(path, dir+"/")], names[ino] = ino, path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// sample is an input root with a bit of everything.
func (f *fixture) sample(t testing.TB) *repb.Digest {
	t.Helper()
	file := func(name, content string) *repb.FileNode {
		return &repb.FileNode{Name: name, Digest: f.put(t, content)}
	}
	lib := f.putMessage(t, &repb.Directory{
		Files:    []*repb.FileNode{file("one", "1"), {Name: "run", Digest: f.put(t, "#!/bin/sh\n"), IsExecutable: true}, file("two", "2")},
		Symlinks: []*repb.SymlinkNode{{Name: "zero", Target: "one"}},
	})
	src := f.putMessage(t, &repb.Directory{
		Files:       []*repb.FileNode{file("again", "1"), file("empty", ""), file("three", "3")},
		Directories: []*repb.DirectoryNode{{Name: "lib", Digest: lib}},
	})
	return f.putMessage(t, &repb.Directory{
		Files:       []*repb.FileNode{file("top", "T")},
		Directories: []*repb.DirectoryNode{{Name: "lib", Digest: lib}, {Name: "src", Digest: src}},
		Symlinks:    []*repb.SymlinkNode{{Name: "link", Target: "src/lib"}},
	})
}

// Whatever a command does to its input root, the next one finds that as it should be.
func TestShelf_keptRoot_isRestored(t *testing.T) {
	scripts := map[string]string{
		"nothing":                "true",
		"output":                 "echo x > out/x; echo y > lib/y; mkdir -p src/a/b/c; echo z > src/a/b/c/z",
		"removes a file":         "rm -f lib/one",
		"removes a directory":    "rm -rf src/lib",
		"removes everything":     "rm -rf *",
		"replaces a file":        "rm -f lib/one; echo 9 > lib/one; chmod 444 lib/one",
		"replaces a copy":        "rm -f src/again src/empty src/lib/one; echo 9 > src/again; echo 9 > src/empty; echo 9 > src/lib/one; chmod 444 src/again src/empty src/lib/one",
		"replaces by a symlink":  "rm -rf lib; ln -s src/lib lib; rm top; ln -s /etc/passwd top",
		"replaces by an equal":   "mv lib/one lib/one2; cp -p lib/one2 lib/one",
		"replaces a directory":   "mv lib lib2; mkdir lib; cp -p lib2/* lib",
		"swaps directories":      "mv lib x; mv src/lib lib; mv x src/lib",
		"swaps files":            "mv lib/one x; mv lib/two lib/one; mv x lib/two",
		"retargets a symlink":    "rm link; ln -s /etc link; rm lib/zero; ln -s two lib/zero",
		"directory for a file":   "rm lib/one; mkdir lib/one; echo x > lib/one/x",
		"file for a directory":   "rm -rf src; echo x > src",
		"chmods directories":     "chmod 777 lib; chmod 000 src/lib",
		"chmods the root":        "chmod 500 .",
		"chmods back":            "chmod 777 lib; chmod 755 lib",
		"times":                  "touch -d 2001-01-01 lib src .; echo x > lib/x; rm lib/x; touch -r src lib",
		"renames and back":       "mv lib/one lib/x; mv lib/x lib/one",
		"fifo and dangling link": "mkfifo lib/fifo; ln -s nowhere src/lib/dangling",
		"hard link within":       "ln top lib/top2; ln lib/one src/lib/extra",
		"many":                   "cd lib; i=0; while [ $i -lt 300 ]; do : > some-long-name-of-a-file-$i; i=$((i+1)); done; rm -f some-long-name-of-a-file-2*",
		"deep":                   "p=.; i=0; while [ $i -lt 90 ]; do p=$p/deeper; i=$((i+1)); done; mkdir -p $p; echo x > $p/x",
	}
	eachOwner(t, func(t *testing.T, f *slotFixture) {
		root := f.sample(t)
		var want []string
		for name, script := range scripts {
			t.Run(name, func(t *testing.T) {
				for range 3 {
					if err := f.build(t, root, "out", "src/lib/made"); err != nil {
						t.Fatal(err)
					}
					got := list(t, f.dir)
					if want == nil {
						want = got
					}
					if diff := cmp.Diff(want, got); diff != "" {
						t.Fatalf("the root of the next action (-want +got):\n%s", diff)
					}
					inodes(t, f.dir)
					f.run(t, script)
					if err := f.root.Audit(t.Context()); err != nil {
						t.Fatalf("Audit: %v", err)
					}
					f.remove(t)
				}
			})
		}
	})
}

// A command that may chmod an input may write to it. Nobody sees that afterwards.
func TestShelf_keptRoot_writtenTo(t *testing.T) {
	for name, script := range map[string]string{
		"link":          "chmod 644 lib/one && echo tampered > lib/one",
		"link, in time": "touch -r lib/one ref && chmod 644 lib/one && printf 9 > lib/one && chmod 444 lib/one && touch -r ref lib/one",
		"mode only":     "chmod 755 lib/one",
		"copy":          "chmod 644 src/again && echo 8 > src/again && chmod 444 src/again",
		"copy, in time": "touch -r src/again ref && chmod 644 src/again && printf 8 > src/again && chmod 444 src/again && touch -r ref src/again",
		"empty file":    "chmod 644 src/empty && echo 8 > src/empty && chmod 444 src/empty",
	} {
		t.Run(name, func(t *testing.T) {
			eachOwner(t, func(t *testing.T, f *slotFixture) {
				root := f.sample(t)
				if err := f.build(t, root); err != nil {
					t.Fatal(err)
				}
				want := list(t, f.dir)
				f.run(t, script)
				// The store's own files are those that matter to others.
				err := f.root.Audit(t.Context())
				if strings.Contains(name, "in time") {
					needCtimes(t, filepath.Dir(f.dir))
				}
				if isLink := !strings.Contains(script, "src/"); errors.Is(err, blob.ErrCorrupt) != (isLink && !f.owner.Set) || err != nil && !errors.Is(err, blob.ErrCorrupt) {
					t.Errorf("Audit: %v", err)
				}
				f.remove(t)
				f.sample(t) // a client brings back what was withdrawn
				if err := f.build(t, root); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, list(t, f.dir)); diff != "" {
					t.Errorf("the root of the next action (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// Roots of random Directories follow each other, with random changes by commands.
func TestShelf_keptRoot_random(t *testing.T) {
	eachOwner(t, func(t *testing.T, f *slotFixture) {
		seed := rand.Uint64()
		t.Log("seed", seed)
		r := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // a test
		fresh := newFixture(t, f.store, inputroot.Options{Policy: inputroot.Link})
		// Most random trees can't be made, since a is no directory. The first one can, and
		// is worth keeping: otherwise one seed of many has nothing that could stay.
		roots := []*repb.Digest{f.randomTree(t, r, 3)}
		for !fresh.canKeep(t, roots[0]) {
			roots[0] = f.randomTree(t, r, 3)
		}
		for range 11 {
			roots = append(roots, f.randomTree(t, r, 3))
		}
		before := map[string]bool{}
		again := 0
		const random = 60
		for round := range random + 2 { // in the last two, nobody changes anything
			root := roots[0]
			if round < random {
				root = roots[r.IntN(len(roots))]
			}
			if _, err := fresh.build(t, root, "out", "a/made"); err != nil {
				if fresh.removeRoot(t); f.build(t, root, "out", "a/made") == nil {
					t.Fatalf("a new root can't be made: %v, a kept one can", err)
				}
				f.remove(t)
				continue
			}
			want := list(t, fresh.dir)
			fresh.removeRoot(t)
			if err := f.build(t, root, "out", "a/made"); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, list(t, f.dir)); diff != "" {
				t.Fatalf("a root made of another (-new +kept):\n%s", diff)
			}
			now := inodes(t, f.dir)
			for name, ino := range now {
				key := fmt.Sprint(name, " ", ino)
				if before[key] {
					again++
				}
				before[key] = true
			}
			if round < random {
				f.run(t, randomScript(r, slices.Sorted(maps.Keys(now))))
			}
			f.remove(t)
		}
		if needCtimes(t, filepath.Dir(f.dir)); again == 0 {
			t.Error("no file stayed")
		}
	})
}

// canKeep reports whether a root can be made, and has enough files to be kept.
func (f *fixture) canKeep(t testing.TB, root *repb.Digest) bool {
	t.Helper()
	defer f.removeRoot(t)
	_, err := f.build(t, root, "out", "a/made")
	return err == nil && len(inodes(t, f.dir)) >= 5
}

func (f *fixture) removeRoot(t testing.TB) {
	t.Helper()
	if err := inputroot.Remove(f.dir); err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) randomTree(t testing.TB, r *rand.Rand, depth int) *repb.Digest {
	t.Helper()
	d := &repb.Directory{}
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		switch n := r.IntN(8); {
		case n < 4:
			d.Files = append(d.Files, &repb.FileNode{Name: name, Digest: f.put(t, strings.Repeat("x", r.IntN(3))), IsExecutable: r.IntN(4) == 0})
		case n == 4:
			d.Symlinks = append(d.Symlinks, &repb.SymlinkNode{Name: name, Target: []string{"a", "b/c", "/nowhere"}[r.IntN(3)]})
		case n < 7 && depth > 0:
			d.Directories = append(d.Directories, &repb.DirectoryNode{Name: name, Digest: f.randomTree(t, r, depth-1)})
		}
	}
	return f.putMessage(t, proto.Message(d))
}

func randomScript(r *rand.Rand, files []string) string {
	var s strings.Builder
	for range r.IntN(4) {
		if len(files) == 0 {
			break
		}
		a, b := files[r.IntN(len(files))], files[r.IntN(len(files))]
		fmt.Fprintln(&s, []string{
			"rm -f " + a, "mv " + a + " " + b, "rm -rf $(dirname " + a + ")", "echo x > new", "cp -p " + a + " " + b + "x",
			"mv $(dirname " + a + ") moved", "rm -f " + a + "; echo other > " + a, "chmod 700 $(dirname " + a + ")", "ln -sf x " + a, "mkdir " + a + "x",
		}[r.IntN(10)])
	}
	return s.String()
}

// Between two actions nothing of them is anywhere but on the shelf, and what is there
// is no more than what was built.
func TestShelf_keptRoot_leavesNothing(t *testing.T) {
	eachOwner(t, func(t *testing.T, f *slotFixture) {
		root := f.sample(t)
		for range 2 {
			if err := f.build(t, root, "out"); err != nil {
				t.Fatal(err)
			}
			f.run(t, "echo secret > out/secret; echo secret > lib/secret; mkdir d; echo secret > d/secret")
			f.remove(t)
			err := filepath.WalkDir(filepath.Dir(f.dir), func(path string, _ fs.DirEntry, err error) error {
				if strings.HasSuffix(path, "secret") {
					t.Errorf("%s is left", path)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	})
}

// The links of a kept root stay as they are while its blobs go, and a root with other
// files takes over those that it shares with it.
func TestShelf_keptRoot_sharesAndChanges(t *testing.T) {
	eachOwner(t, func(t *testing.T, f *slotFixture) {
		needCtimes(t, filepath.Dir(f.dir))
		tree := func(last string) *repb.Digest {
			lib := &repb.Directory{}
			for i := range 20 {
				lib.Files = append(lib.Files, &repb.FileNode{Name: fmt.Sprintf("f%02d", i), Digest: f.put(t, fmt.Sprint("content ", i))})
			}
			src := &repb.Directory{Files: []*repb.FileNode{{Name: "a", Digest: f.put(t, "A")}, {Name: "b", Digest: f.put(t, last)}}}
			return f.putMessage(t, &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "lib", Digest: f.putMessage(t, lib)}, {Name: "src", Digest: f.putMessage(t, src)}}})
		}
		first, second := tree("first"), tree("second")
		if err := f.build(t, first); err != nil {
			t.Fatal(err)
		}
		before := inodes(t, f.dir)
		libIno := inode(t, f.dir+"/lib")
		f.remove(t)
		if err := f.build(t, second); err != nil {
			t.Fatal(err)
		}
		after := inodes(t, f.dir)
		for name, ino := range before {
			if same := after[name] == ino; same != (name != "src/b") {
				t.Errorf("%s is the same inode: %v", name, same)
			}
		}
		if inode(t, f.dir+"/lib") != libIno {
			t.Error("an equal directory was made anew")
		}
		var st unix.Stat_t
		if err := unix.Lstat(f.dir+"/src/b", &st); err != nil || st.Size != int64(len("second")) {
			t.Errorf("the file that changed has %d bytes, %v", st.Size, err)
		}
		f.remove(t)
	})
}
