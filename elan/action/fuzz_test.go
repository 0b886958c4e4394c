package action_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

// always are entries that are all the same.
type always []byte

func (a always) Entry(context.Context, blob.EntryKey) ([]byte, error)  { return bytes.Clone(a), nil }
func (a always) PutEntry(context.Context, blob.EntryKey, []byte) error { return nil }
func (a always) DeleteEntry(context.Context, blob.EntryKey) error      { return nil }

func encoded(t testing.TB, m proto.Message) []byte {
	t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// FuzzEntries: whatever the entries of a store are, they are results and failures, or
// as if they were not there.
func FuzzEntries(f *testing.F) {
	store, err := mem.New(mem.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { store.Close() })
	entries, err := mem.New(mem.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { entries.Close() })
	k := blob.EntryKey{Action: digest.Of(digest.SHA256, []byte("x"))}
	kept, err := action.NewFailures(action.FailuresOptions{Entries: entries})
	if err != nil {
		f.Fatal(err)
	}
	if err := kept.Put(f.Context(), k, &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 1}}); err != nil {
		f.Fatal(err)
	}
	failure, err := entries.Entry(f.Context(), blob.EntryKey{Instance: action.FailedInstance(""), Action: k.Action})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(failure)
	f.Add(encoded(f, &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "a", Digest: digest.Empty(digest.SHA256).Proto()}}}))
	f.Add(encoded(f, &repb.ActionResult{OutputDirectories: []*repb.OutputDirectory{{Path: "a", TreeDigest: k.Action.Proto()}}}))
	f.Add([]byte(`{"action":"x/5","time":"2026-01-02T03:04:05Z"}`))
	f.Fuzz(func(t *testing.T, value []byte) {
		c, err := action.New(action.Options{Store: store, Entries: always(value)})
		if err != nil {
			t.Fatal(err)
		}
		if r, err := c.Get(t.Context(), k); err != nil && !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("result: %v", err)
		} else if err == nil && (r == nil || r.ExitCode != 0) {
			t.Errorf("result %v", r)
		}
		failures, err := action.NewFailures(action.FailuresOptions{Entries: always(value)})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := failures.Get(t.Context(), k); err != nil && !errors.Is(err, blob.ErrNotFound) || err == nil && got.Response == nil {
			t.Errorf("failure %v, %v", got, err)
		}
		infos, err := failures.List(t.Context())
		if err != nil {
			t.Errorf("list: %v", err)
		}
		for _, i := range infos {
			if i.Key.Action.IsZero() || time.Since(i.Time) > 365*24*time.Hour {
				t.Errorf("the list has %+v", i)
			}
		}
	})
}

// FuzzPut: a result of a client is refused for what is wrong with it, or comes back
// as it went.
func FuzzPut(f *testing.F) {
	store, err := mem.New(mem.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { store.Close() })
	c, err := action.New(action.Options{Store: store, Entries: store})
	if err != nil {
		f.Fatal(err)
	}
	put := func(data []byte) *repb.Digest {
		d := digest.Of(digest.SHA256, data)
		if err := blob.WriteBytes(f.Context(), store, d, data); err != nil {
			f.Fatal(err)
		}
		return d.Proto()
	}
	file := put([]byte("data"))
	leaf := &repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: file}}}
	root := &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "d", Digest: put(encoded(f, leaf))}}}
	tree := put(encoded(f, &repb.Tree{Root: root, Children: []*repb.Directory{leaf}}))
	for _, r := range []*repb.ActionResult{
		{},
		{ExitCode: 1},
		{OutputFiles: []*repb.OutputFile{{Path: "a/b", Digest: file, IsExecutable: true}}, StdoutRaw: []byte("out"), StdoutDigest: file},
		{OutputDirectories: []*repb.OutputDirectory{{Path: "d", TreeDigest: tree, RootDirectoryDigest: put(encoded(f, root))}}, StderrDigest: file},
		{OutputSymlinks: []*repb.OutputSymlink{{Path: "l", Target: "a"}}, OutputFileSymlinks: []*repb.OutputSymlink{{Path: "../l", Target: "/"}}},
		{OutputFiles: []*repb.OutputFile{{Path: "a", Digest: &repb.Digest{Hash: file.Hash, SizeBytes: 1 << 60}}}},
		{OutputDirectories: []*repb.OutputDirectory{{Path: "", TreeDigest: file}}},
	} {
		f.Add(encoded(f, r))
	}
	k := blob.EntryKey{Action: digest.Of(digest.SHA256, []byte("x"))}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := &repb.ActionResult{}
		if proto.Unmarshal(data, r) != nil {
			return
		}
		if err := c.Put(t.Context(), k, r); err != nil {
			_, missing := errors.AsType[*blob.MissingError](err)
			if !missing && !errors.Is(err, action.ErrInvalid) && !errors.Is(err, action.ErrNotCacheable) && !errors.Is(err, blob.ErrTooLarge) {
				t.Errorf("%v says not whose fault it is", err)
			}
			return
		}
		got, err := c.Get(t.Context(), k)
		if err != nil {
			t.Fatalf("it was taken, and is not there: %v", err)
		}
		if got.ExitCode != 0 || len(got.OutputFiles) != len(r.OutputFiles) || len(got.OutputDirectories) != len(r.OutputDirectories) {
			t.Errorf("%v came back as %v", r, got)
		}
	})
}
