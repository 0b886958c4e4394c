package rpc_test

import (
	"errors"
	"fmt"
	"io"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

// putDir stores a Directory with the given children.
func (s *server) putDir(t *testing.T, file string, children ...digest.Digest) digest.Digest {
	t.Helper()
	dir := &repb.Directory{}
	if file != "" {
		dir.Files = []*repb.FileNode{{Name: file, Digest: of([]byte(file)).Proto()}}
	}
	for i, c := range children {
		dir.Directories = append(dir.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("child%06d", i), Digest: c.Proto()})
	}
	_, data, err := digest.OfMessage(digest.SHA256, dir)
	if err != nil {
		t.Fatal(err)
	}
	return s.store.put(data)
}

// getTree returns the pages of one call.
func (s *server) getTree(t *testing.T, req *repb.GetTreeRequest) ([]*repb.GetTreeResponse, error) {
	t.Helper()
	stream, err := s.cas.GetTree(t.Context(), req)
	if err != nil {
		return nil, err
	}
	var pages []*repb.GetTreeResponse
	for {
		page, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return pages, nil
		}
		if err != nil {
			return nil, err
		}
		pages = append(pages, page)
	}
}

// list is the digests of the Directories of pages, in order.
func list(t *testing.T, pages []*repb.GetTreeResponse) (all []digest.Digest) {
	t.Helper()
	for _, p := range pages {
		for _, dir := range p.Directories {
			d, _, err := digest.OfMessage(digest.SHA256, dir)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, d)
		}
	}
	return all
}

func TestGetTree_pages(t *testing.T) {
	s := start(t, rpc.Options{})
	var leaves []digest.Digest
	for i := range 23 {
		leaves = append(leaves, s.putDir(t, fmt.Sprint("leaf", i)))
	}
	root := s.putDir(t, "", s.putDir(t, "a", leaves...), s.putDir(t, "b", leaves[:7]...))
	whole, err := s.getTree(t, &repb.GetTreeRequest{RootDigest: root.Proto()})
	if err != nil {
		t.Fatal(err)
	}
	want := list(t, whole)
	if len(want) != 26 || want[0] != root || len(whole) != 1 || whole[0].NextPageToken != "" {
		t.Fatalf("%d directories in %d pages, want 26 in one, the root first", len(want), len(whole))
	}
	pages, err := s.getTree(t, &repb.GetTreeRequest{RootDigest: root.Proto(), PageSize: 4})
	if err != nil {
		t.Fatal(err)
	}
	if len(pages) != 7 {
		t.Errorf("%d pages, want 7 of 4", len(pages))
	}
	seen := 0
	for i, p := range pages {
		if (p.NextPageToken == "") != (i == len(pages)-1) || len(p.Directories) > 4 {
			t.Errorf("page %d has token %q and %d directories", i, p.NextPageToken, len(p.Directories))
		}
		seen += len(p.Directories)
		if p.NextPageToken == "" {
			continue
		}
		// Whoever stopped here goes on with the rest.
		rest, err := s.getTree(t, &repb.GetTreeRequest{RootDigest: root.Proto(), PageToken: p.NextPageToken})
		if err != nil {
			t.Fatal(err)
		}
		if got := list(t, rest); fmt.Sprint(got) != fmt.Sprint(want[seen:]) {
			t.Errorf("after page %d: %d directories, want the other %d", i, len(got), len(want)-seen)
		}
	}
}

func TestGetTree_messages_are_bounded(t *testing.T) {
	s := start(t, rpc.Options{MaxMessageBytes: 64 << 10, MaxBatchBytes: 1000})
	var children []digest.Digest
	for i := range 400 {
		children = append(children, s.putDir(t, fmt.Sprintf("%0400d", i)))
	}
	pages, err := s.getTree(t, &repb.GetTreeRequest{RootDigest: s.putDir(t, "", children...).Proto()})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(list(t, pages)); n != 401 || len(pages) < 3 {
		t.Errorf("%d directories in %d pages, want 401 in several", n, len(pages))
	}
	for i, p := range pages {
		if n := proto.Size(p); n > 64<<10 {
			t.Errorf("page %d has %d bytes, want at most 64 KiB", i, n)
		}
	}
}

// A DAG of diamonds has as many paths as 2 to its depth.
func TestGetTree_diamonds(t *testing.T) {
	s := start(t, rpc.Options{})
	d := s.putDir(t, "bottom")
	for range 200 {
		d = s.putDir(t, "", d, d)
	}
	pages, err := s.getTree(t, &repb.GetTreeRequest{RootDigest: d.Proto()})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(list(t, pages)); n != 201 {
		t.Errorf("%d directories, want 201, each once", n)
	}
}

func TestGetTree_missing_parts(t *testing.T) {
	s := start(t, rpc.Options{})
	below := s.putDir(t, "below")
	gone := s.putDir(t, "gone", below)
	there := s.putDir(t, "there")
	root := s.putDir(t, "", gone, there)
	s.store.remove(gone)
	pages, err := s.getTree(t, &repb.GetTreeRequest{RootDigest: root.Proto()})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(list(t, pages)), fmt.Sprint([]digest.Digest{root, there}); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	_, err = s.getTree(t, &repb.GetTreeRequest{RootDigest: gone.Proto()})
	wantCode(t, "GetTree of a missing root", err, codes.NotFound)
}

func TestGetTree_refusals(t *testing.T) {
	s := start(t, rpc.Options{})
	root := s.putDir(t, "x")
	text := s.store.put([]byte("no Directory"))
	unsorted := s.store.put(func() []byte {
		data, err := proto.Marshal(&repb.Directory{Files: []*repb.FileNode{{Name: "..", Digest: text.Proto()}}})
		if err != nil {
			t.Fatal(err)
		}
		return data
	}())
	for _, tc := range []struct {
		name string
		req  *repb.GetTreeRequest
		want codes.Code
	}{
		{"no digest", &repb.GetTreeRequest{}, codes.InvalidArgument},
		{"negative page size", &repb.GetTreeRequest{RootDigest: root.Proto(), PageSize: -1}, codes.InvalidArgument},
		{"unknown token", &repb.GetTreeRequest{RootDigest: root.Proto(), PageToken: "x"}, codes.InvalidArgument},
		{"no Directory", &repb.GetTreeRequest{RootDigest: text.Proto()}, codes.InvalidArgument},
		{"malformed Directory", &repb.GetTreeRequest{RootDigest: unsorted.Proto()}, codes.InvalidArgument},
		{"malformed child", &repb.GetTreeRequest{RootDigest: s.putDir(t, "", unsorted).Proto()}, codes.InvalidArgument},
		{"size of terabytes", &repb.GetTreeRequest{RootDigest: &repb.Digest{Hash: root.Hash(), SizeBytes: 1 << 50}}, codes.InvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := s.getTree(t, tc.req)
			wantCode(t, "GetTree", err, tc.want)
		})
	}
}

func TestGetTree_empty_root(t *testing.T) {
	s := start(t, rpc.Options{})
	pages, err := s.getTree(t, &repb.GetTreeRequest{RootDigest: digest.Empty(digest.SHA256).Proto()})
	if err != nil || len(pages) != 1 || len(pages[0].Directories) != 1 {
		t.Errorf("%v, %v, want one empty Directory", pages, err)
	}
}
