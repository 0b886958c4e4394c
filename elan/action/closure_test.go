package action_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/digest"
)

// counted is a store that counts the digests that it is asked for, and what is read.
type counted struct {
	*fakeStore
	asked, opened int
}

func (c *counted) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	c.asked += len(ds)
	return c.fakeStore.FindMissing(ctx, ds)
}

func (c *counted) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	c.opened++
	return c.fakeStore.Open(ctx, d, offset)
}

// TestCache_directories_alike: a result of some megabytes may refer to one Tree of
// megabytes ten thousands of times. It is read once, and its blobs are gathered once.
func TestCache_directories_alike(t *testing.T) {
	const times, files = 500, 200
	s := &counted{fakeStore: newFakeStore(t)}
	root := &repb.Directory{}
	for i := range files {
		root.Files = append(root.Files, &repb.FileNode{Name: fmt.Sprintf("%03d", i), Digest: s.put(fmt.Append(nil, i)).Proto()})
	}
	directory := putMessage(t, s.fakeStore, root)
	tree := putMessage(t, s.fakeStore, &repb.Tree{Root: root})
	for name, out := range map[string]*repb.OutputDirectory{
		"tree":      {TreeDigest: tree.Proto()},
		"directory": {RootDirectoryDigest: directory.Proto()},
		"both":      {TreeDigest: tree.Proto(), RootDirectoryDigest: directory.Proto()},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := action.New(action.Options{Store: s, Entries: s})
			if err != nil {
				t.Fatal(err)
			}
			r := &repb.ActionResult{}
			for i := range times {
				r.OutputDirectories = append(r.OutputDirectories, &repb.OutputDirectory{
					Path: fmt.Sprint(i), TreeDigest: out.TreeDigest, RootDirectoryDigest: out.RootDirectoryDigest,
				})
			}
			s.asked, s.opened = 0, 0
			err = c.Put(t.Context(), key(), r)
			if err == nil {
				_, err = c.Get(t.Context(), key())
			}
			if err != nil {
				t.Fatal(err)
			}
			if s.asked > 2*(files+2*times+2) || s.opened > 2 {
				t.Errorf("Put and Get looked up %d blobs and read %d, of %d files", s.asked, s.opened, files)
			}
			s.remove(directory)
			defer putMessage(t, s.fakeStore, root)
			if _, err = c.Get(t.Context(), key()); (err == nil) != (out.RootDirectoryDigest == nil) {
				t.Errorf("Get without the root Directory: %v", err)
			}
		})
	}
	// The root that one of those that are alike names is still compared.
	c := newCache(t, s.fakeStore)
	r := &repb.ActionResult{OutputDirectories: []*repb.OutputDirectory{
		{Path: "a", TreeDigest: tree.Proto()}, {Path: "b", TreeDigest: tree.Proto(), RootDirectoryDigest: tree.Proto()},
	}}
	if err := c.Put(t.Context(), key(), r); !errors.Is(err, action.ErrInvalid) {
		t.Errorf("another root: %v, want ErrInvalid", err)
	}
}

// slow is a store in which reading waits.
type slow struct {
	*fakeStore
	reading atomic.Int64
}

func (s *slow) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	s.reading.Add(1)
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestCache_Trees_at_once: however many results are asked for, the memory that
// their Trees take is bounded, and who waits for it can give up.
func TestCache_Trees_at_once(t *testing.T) {
	s := &slow{fakeStore: newFakeStore(t)}
	root := &repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: s.put([]byte("x")).Proto()}}}
	tree := putMessage(t, s.fakeStore, &repb.Tree{Root: root})
	r := &repb.ActionResult{OutputDirectories: []*repb.OutputDirectory{{Path: "d", TreeDigest: tree.Proto()}}}
	if err := newCache(t, s.fakeStore).Put(t.Context(), key(), r); err != nil {
		t.Fatal(err)
	}
	c, err := action.New(action.Options{Store: s, Entries: s, MaxTreeBytes: tree.Size()})
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		for range 20 {
			go func() {
				if _, err := c.Get(ctx, key()); !errors.Is(err, context.Canceled) {
					t.Errorf("Get: %v, want Canceled", err)
				}
			}()
		}
		synctest.Wait()
		if n := s.reading.Load(); n != 4 {
			t.Errorf("%d Trees are read at once, want 4", n)
		}
		cancel()
		synctest.Wait()
	})
}

// TestCache_many_blobs: what a result refers to is held in memory.
func TestCache_many_blobs(t *testing.T) {
	s := newFakeStore(t)
	file := s.put([]byte("x"))
	directory := &repb.Directory{}
	for i := range 100 {
		directory.Files = append(directory.Files, &repb.FileNode{Name: fmt.Sprintf("%03d", i), Digest: file.Proto()})
	}
	root, tree := putMessage(t, s, directory), putMessage(t, s, &repb.Tree{Root: directory})
	for name, r := range map[string]*repb.ActionResult{
		"tree":      {OutputDirectories: []*repb.OutputDirectory{{TreeDigest: tree.Proto()}}},
		"directory": {OutputDirectories: []*repb.OutputDirectory{{RootDirectoryDigest: root.Proto()}}},
		"file":      {OutputFiles: slices.Repeat([]*repb.OutputFile{{Path: "f", Digest: file.Proto()}}, 102)},
	} {
		for limit, want := range map[int]error{100: action.ErrInvalid, 103: nil} {
			c, err := action.New(action.Options{Store: s, Entries: s, MaxBlobs: limit})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Put(t.Context(), key(), r); !errors.Is(err, want) {
				t.Errorf("%s, at most %d: %v, want %v", name, limit, err, want)
			}
		}
	}
}
