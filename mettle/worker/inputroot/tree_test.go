//go:build linux

package inputroot_test

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

// spoiled is the stream of a GetTree whose pages are changed.
type spoiled struct {
	grpc.ClientStream
	spoil func(*repb.GetTreeResponse) error
}

func (s spoiled) RecvMsg(m any) error {
	if err := s.ClientStream.RecvMsg(m); err != nil {
		return err
	}
	// Whoever receives it may not know its fields.
	data, err := proto.Marshal(m.(proto.Message))
	if err != nil {
		return err
	}
	page := &repb.GetTreeResponse{}
	if err := errors.Join(proto.Unmarshal(data, page), s.spoil(page)); err != nil {
		return err
	}
	if data, err = proto.Marshal(page); err != nil {
		return err
	}
	return proto.Unmarshal(data, m.(proto.Message))
}

// A server may have its own idea of GetTree. It costs calls, and nothing else.
func TestBuild_tree_of_a_foreign_server(t *testing.T) {
	foreign := &repb.Directory{Symlinks: []*repb.SymlinkNode{{Name: "foreign", Target: "x"}}}
	for _, tc := range []struct {
		name    string
		spoil   func(*repb.GetTreeResponse) error
		batches int // of Directories and files
	}{
		{"nothing comes", func(r *repb.GetTreeResponse) error { r.Directories = nil; return nil }, 4},
		{"half comes", func(r *repb.GetTreeResponse) error { r.Directories = r.Directories[:30]; return nil }, 3},
		{"all comes twice", func(r *repb.GetTreeResponse) error {
			r.Directories = append(r.Directories, r.Directories...)
			return nil
		}, 2},
		// Only the upper of them are known to belong there when they come.
		{"children come first", func(r *repb.GetTreeResponse) error { slices.Reverse(r.Directories); return nil }, 3},
		{"others come", func(r *repb.GetTreeResponse) error { r.Directories = append(r.Directories, foreign); return nil }, 2},
		{"one is another", func(r *repb.GetTreeResponse) error { r.Directories[40] = foreign; return nil }, 3},
		{"it has none", func(*repb.GetTreeResponse) error { return status.Error(codes.Unimplemented, "no") }, 4},
		{"it fails", func(*repb.GetTreeResponse) error { return status.Error(codes.Internal, "no") }, 4},
		{"it refuses", func(*repb.GetTreeResponse) error { return status.Error(codes.ResourceExhausted, "no") }, 4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNetwork(t, rpc.Options{})
			root, _ := thousand(t, n.store)
			n.spoilTree = tc.spoil
			cached := n.cached(t)
			f := newFixture(t, cached, inputroot.Options{Policy: inputroot.Link})
			if _, err := f.build(t, root.Proto()); err != nil {
				t.Fatal(err)
			}
			want := map[string]int{"GetCapabilities": 1, "BatchReadBlobs": tc.batches, "GetTree": 1}
			if got := n.counted(); !maps.Equal(got, want) {
				t.Errorf("calls %v, want %v", got, want)
			}
			if _, err := os.Lstat(filepath.Join(f.dir, "d4", "d9", "f19")); err != nil {
				t.Error(err)
			}
			d, _, err := digest.OfMessage(digest.SHA256, foreign)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := cached.Open(t.Context(), d, 0); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("the foreign Directory was kept: %v", err)
			}
		})
	}
}

// Where part of the tree is here, only the rest is fetched.
func TestBuild_tree_in_part(t *testing.T) {
	n := newNetwork(t, rpc.Options{})
	root, _ := thousand(t, n.store)
	cached := n.cached(t)
	top := &repb.Directory{}
	if err := blob.ReadMessage(t.Context(), n.store, root, 1<<20, top); err != nil {
		t.Fatal(err)
	}
	d, err := digest.FromProto(digest.SHA256, top.Directories[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	// Another action had it.
	if _, err := newFixture(t, cached, inputroot.Options{Policy: inputroot.Link}).build(t, d.Proto()); err != nil {
		t.Fatal(err)
	}
	n.counted()
	if _, err := newFixture(t, cached, inputroot.Options{Policy: inputroot.Link}).build(t, root.Proto()); err != nil {
		t.Fatal(err)
	}
	if got := n.counted(); got["GetTree"] != 0 {
		t.Errorf("calls %v, want no GetTree", got)
	}
}
