package client_test

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
)

// treeServer gives one page by each call.
type treeServer struct {
	repb.UnimplementedContentAddressableStorageServer
	pages []*repb.GetTreeResponse
	fail  error
	stuck bool // it gives the same token for ever
	calls int
}

func (s *treeServer) GetTree(req *repb.GetTreeRequest, stream grpc.ServerStreamingServer[repb.GetTreeResponse]) error {
	s.calls++
	if s.fail != nil {
		return s.fail
	}
	n := 0
	if req.PageToken != "" {
		var err error
		if n, err = strconv.Atoi(req.PageToken); err != nil {
			return gstatus.Error(codes.InvalidArgument, err.Error())
		}
	}
	page := proto.Clone(s.pages[n]).(*repb.GetTreeResponse)
	switch {
	case s.stuck:
		page.NextPageToken = "0"
	case n+1 < len(s.pages):
		page.NextPageToken = strconv.Itoa(n + 1)
	}
	return stream.Send(page)
}

func TestClient_ReadTree(t *testing.T) {
	dir := func(i int) *repb.Directory {
		return &repb.Directory{Symlinks: []*repb.SymlinkNode{{Name: fmt.Sprint(i), Target: "x"}}}
	}
	pages := []*repb.GetTreeResponse{{Directories: []*repb.Directory{dir(0), dir(1)}}, {Directories: []*repb.Directory{dir(2)}}, {}}
	root, _, err := digest.OfMessage(digest.SHA256, dir(0))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		s     treeServer
		want  int // Directories
		calls int // of two ReadTrees
		err   error
	}{
		{name: "pages", s: treeServer{pages: pages}, want: 3, calls: 6},
		{name: "always the same page", s: treeServer{pages: pages, stuck: true}, want: 4, calls: 4},
		{name: "none", s: treeServer{fail: gstatus.Error(codes.Unimplemented, "no")}, calls: 1, err: errors.ErrUnsupported},
		{name: "too large", s: treeServer{fail: gstatus.Error(codes.ResourceExhausted, "no")}, calls: 2, err: errors.ErrUnsupported},
		{name: "missing", s: treeServer{fail: gstatus.Error(codes.NotFound, "no")}, calls: 2, err: blob.ErrNotFound},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newClient(t, client.Options{Conn: start(t, func(_ testing.TB, g *grpc.Server) {
				repb.RegisterContentAddressableStorageServer(g, &tc.s)
			})})
			for range 2 {
				var got []digest.Digest
				err := c.ReadTree(t.Context(), root, func(data []byte) error {
					got = append(got, digest.Of(digest.SHA256, data))
					return nil
				})
				if !errors.Is(err, tc.err) || len(got) != tc.want || len(got) > 0 && !slices.Contains(got, root) {
					t.Errorf("%d Directories, %v, want %d and %v", len(got), err, tc.want, tc.err)
				}
			}
			if tc.s.calls != tc.calls {
				t.Errorf("%d calls, want %d", tc.s.calls, tc.calls)
			}
		})
	}
}

func TestClient_ReadTree_ends_when_told(t *testing.T) {
	s := &treeServer{pages: []*repb.GetTreeResponse{{Directories: []*repb.Directory{{}, {}}}}}
	c := newClient(t, client.Options{Conn: start(t, func(_ testing.TB, g *grpc.Server) { repb.RegisterContentAddressableStorageServer(g, s) })})
	enough := errors.New("enough")
	calls := 0
	err := c.ReadTree(t.Context(), digest.Of(digest.SHA256, []byte("root")), func([]byte) error { calls++; return enough })
	if !errors.Is(err, enough) || calls != 1 {
		t.Errorf("%v after %d Directories, want %v after 1", err, calls, enough)
	}
}
