//go:build linux

package inputroot_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

// A root that can't be kept, for the properties of a file, is looked at all the same.
func TestRoot_Audit_of_a_root_that_is_not_kept(t *testing.T) {
	f := newSlot(t, inputroot.LinkAndAudit, inputroot.Owner{})
	needCtimes(t, filepath.Dir(f.dir))
	root := f.putMessage(t, &repb.Directory{Files: []*repb.FileNode{
		{Name: "dated", Digest: f.put(t, "D"), NodeProperties: &repb.NodeProperties{Mtime: timestamppb.New(time.Unix(1, 0))}},
		{Name: "linked", Digest: f.put(t, "1")},
	}})
	for _, tc := range []struct {
		script string
		wrong  bool
	}{
		{"cat linked; ln linked other; rm other", false},
		{"touch -r linked ref && chmod 644 linked && printf 9 > linked && chmod 444 linked && touch -r ref linked", true},
	} {
		if err := f.build(t, root); err != nil {
			t.Fatal(err)
		}
		f.run(t, tc.script)
		if err := f.root.Audit(t.Context()); errors.Is(err, blob.ErrCorrupt) != tc.wrong || err != nil && !tc.wrong {
			t.Errorf("Audit after %q: %v", tc.script, err)
		}
		f.remove(t)
	}
	if left := list(t, filepath.Join(filepath.Dir(f.dir), "shelf")); len(left) > 1 {
		t.Errorf("the shelf has %q", left)
	}
}

// A command that has written to an input can't hide it by removing its own link, nor is
// it held against one that removes an input that the store does without meanwhile.
func TestRoot_Audit_of_removed_inputs(t *testing.T) {
	const write = "touch -r a ref && chmod 644 a && printf 9 > a && chmod 444 a && touch -r ref a && rm ref"
	for name, tc := range map[string]struct {
		script  string
		evicted bool
		wrong   bool
	}{
		"removed":              {"rm a; mv b c", false, false},
		"written and removed":  {write + "; rm a", false, true},
		"written and renamed":  {write + "; mv a other", false, true},
		"written and labelled": {write + "; touch label", false, true},
		"evicted":              {"rm a", true, false},
		"evicted, written":     {write, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			f := newSlot(t, inputroot.LinkAndAudit, inputroot.Owner{})
			needCtimes(t, filepath.Dir(f.dir))
			var files []*repb.FileNode
			for _, n := range []string{"a", "b", "c0", "d", "e"} {
				files = append(files, &repb.FileNode{Name: n, Digest: f.put(t, n)})
			}
			if err := f.build(t, f.putMessage(t, &repb.Directory{Files: files})); err != nil {
				t.Fatal(err)
			}
			f.run(t, tc.script)
			if _, err := os.Lstat(filepath.Join(f.dir, "label")); err == nil {
				if err := unix.Setxattr(filepath.Join(f.dir, "a"), "user.label", []byte("1"), 0); err != nil {
					t.Skipf("no extended attributes here: %v", err)
				}
			}
			d := digest.Of(digest.SHA256, []byte("a"))
			if tc.evicted {
				if err := f.store.(interface {
					Remove(ctx context.Context, d digest.Digest) error
				}).Remove(t.Context(), d); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.root.Audit(t.Context()); errors.Is(err, blob.ErrCorrupt) != tc.wrong || err != nil && !tc.wrong {
				t.Errorf("Audit after %q: %v", tc.script, err)
			}
			if data, err := blob.ReadAll(t.Context(), f.store, d, 1); err == nil && string(data) != "a" {
				t.Errorf("the store has %q", data)
			}
		})
	}
}

// evicting loses a blob as soon as it is linked.
type evicting struct {
	*file.Store
	victim digest.Digest
}

func (e evicting) Link(ctx context.Context, d digest.Digest, dst string, mode blob.LinkMode) error {
	err := e.Store.Link(ctx, d, dst, mode)
	if d == e.victim {
		err = errors.Join(err, e.Remove(ctx, d))
	}
	return err
}

// That a file has no other name says nothing of those beside it.
func TestRoot_Audit_beside_an_evicted_input(t *testing.T) {
	f := newSlot(t, inputroot.LinkAndAudit, inputroot.Owner{})
	needCtimes(t, filepath.Dir(f.dir))
	store := evicting{f.store.(*file.Store), digest.Of(digest.SHA256, []byte("a"))}
	f.fixture = newFixture(t, store, inputroot.Options{Policy: inputroot.LinkAndAudit})
	var err error
	if f.shelf, err = inputroot.NewShelf(filepath.Join(filepath.Dir(f.dir), "shelf"), inputroot.Owner{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.shelf.Close() })
	var files []*repb.FileNode
	for _, n := range []string{"a", "b", "c", "d", "e"} {
		files = append(files, &repb.FileNode{Name: n, Digest: f.put(t, n)})
	}
	if err := f.build(t, f.putMessage(t, &repb.Directory{Files: files})); err != nil {
		t.Fatal(err)
	}
	f.run(t, "touch -r b ref && chmod 644 b && printf 9 > b && chmod 444 b && touch -r ref b")
	if err := f.root.Audit(t.Context()); !errors.Is(err, blob.ErrCorrupt) {
		t.Errorf("Audit: %v", err)
	}
}
