package conform

import (
	"context"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// getTree is all pages of a tree, and how many there were.
func (t *T) getTree(ctx context.Context, root *repb.Digest, pageSize int32) (dirs []*repb.Directory, pages int, err error) {
	token := ""
	for {
		s, err := t.calls.cas.GetTree(ctx, &repb.GetTreeRequest{InstanceName: t.o.Instance, RootDigest: root, PageSize: pageSize, PageToken: token, DigestFunction: t.function()})
		if err != nil {
			return dirs, pages, err
		}
		token = ""
		for r, err := range messages(s.Recv) {
			if err != nil {
				return dirs, pages, err
			}
			dirs, token = append(dirs, r.Directories...), r.NextPageToken
			pages++
		}
		if token == "" {
			return dirs, pages, nil
		}
	}
}

// directory is one of the case's, with files that nobody else has.
func (t *T) directory(children map[string]*repb.Digest, names ...string) *repb.Directory {
	d := &repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: t.fresh()}}}
	for _, n := range names {
		d.Directories = append(d.Directories, &repb.DirectoryNode{Name: n, Digest: children[n]})
	}
	return d
}

//nolint:revive // a table
func treeCases() []Case {
	const (
		enumerate = "The server will enumerate the `Directory` tree recursively and return every node descended from the root."
		partly    = "If part of the tree is missing from the CAS, the server will return the portion present and omit the rest."
		pageSize  = "If present, the server will request no more than this many items."
		noRoot    = "The requested tree root is not present in the CAS."
	)
	cas := []need{needsCache}
	includes := func(t *T, got []*repb.Directory, want ...*repb.Directory) {
		for i, w := range want {
			found := false
			for _, g := range got {
				found = found || proto.Equal(g, w)
			}
			if !found {
				t.errorf("directory %d of %d is not in the answer of %d directories", i, len(want), len(got))
			}
		}
	}
	return []Case{
		{Name: "get_tree/one_directory", Clause: enumerate, Needs: cas, run: func(ctx context.Context, t *T) {
			root := t.directory(nil)
			got, _, err := t.getTree(ctx, t.putMessage(ctx, root), 0)
			t.ok("GetTree", err)
			includes(t, got, root)
		}},
		{Name: "get_tree/nested", Clause: enumerate, Needs: cas, run: func(ctx context.Context, t *T) {
			leaf := t.directory(nil)
			middle := t.directory(map[string]*repb.Digest{"leaf": t.putMessage(ctx, leaf)}, "leaf")
			other := t.directory(nil)
			root := t.directory(map[string]*repb.Digest{"a": t.putMessage(ctx, middle), "b": t.putMessage(ctx, other)}, "a", "b")
			got, _, err := t.getTree(ctx, t.putMessage(ctx, root), 0)
			t.ok("GetTree", err)
			includes(t, got, root, middle, leaf, other)
		}},
		{Name: "get_tree/empty_directory", Clause: emptyClause, Needs: cas, run: func(ctx context.Context, t *T) {
			got, _, err := t.getTree(ctx, t.digest(nil), 0)
			t.ok("GetTree of the empty directory, which is the empty blob", err)
			if len(got) > 1 {
				t.errorf("%d directories", len(got))
			}
		}},
		{Name: "get_tree/no_root", Clause: noRoot, Needs: cas, run: func(ctx context.Context, t *T) {
			_, _, err := t.getTree(ctx, t.fresh(), 0)
			t.want("GetTree of what is not there", err, codes.NotFound)
		}},
		{Name: "get_tree/part_is_missing", Clause: partly, Needs: cas, run: func(ctx context.Context, t *T) {
			there := t.directory(nil)
			root := t.directory(map[string]*repb.Digest{"a": t.fresh(), "b": t.putMessage(ctx, there)}, "a", "b")
			got, _, err := t.getTree(ctx, t.putMessage(ctx, root), 0)
			t.ok("GetTree", err)
			includes(t, got, root, there)
			if len(got) > 2 {
				t.errorf("%d directories, of which 2 are there", len(got))
			}
		}},
		{Name: "get_tree/diamonds", Clause: enumerate, Needs: cas, run: func(ctx context.Context, t *T) {
			// As a tree this has a billion nodes.
			d := t.putMessage(ctx, t.directory(nil))
			for range 30 {
				d = t.putMessage(ctx, t.directory(map[string]*repb.Digest{"a": d, "b": d}, "a", "b"))
			}
			got, _, err := t.getTree(ctx, d, 0)
			t.ok("GetTree of directories that share children", err)
			if len(got) < 31 {
				t.errorf("%d directories, there are 31", len(got))
			}
		}},
		{Name: "get_tree/page_size", Clause: pageSize, Needs: cas, run: func(ctx context.Context, t *T) {
			children := map[string]*repb.Digest{}
			var names []string
			var want []*repb.Directory
			for i := range 20 {
				d := t.directory(nil)
				names = append(names, fmt.Sprintf("d%02d", i))
				children[names[i]] = t.putMessage(ctx, d)
				want = append(want, d)
			}
			root := t.directory(children, names...)
			d := t.putMessage(ctx, root)
			s, err := t.calls.cas.GetTree(ctx, &repb.GetTreeRequest{InstanceName: t.o.Instance, RootDigest: d, PageSize: 5, DigestFunction: t.function()})
			t.ok("GetTree", err)
			r, err := s.Recv()
			t.ok("GetTree", err)
			if len(r.Directories) > 5 {
				t.errorf("a page of 5 has %d directories", len(r.Directories))
			}
			got, _, err := t.getTree(ctx, d, 5)
			t.ok("GetTree", err)
			includes(t, got, append(want, root)...)
		}},
		{Name: "get_tree/bad_token", Clause: "A page token, which must be a value received in a previous", Needs: cas, run: func(ctx context.Context, t *T) {
			s, err := t.calls.cas.GetTree(ctx, &repb.GetTreeRequest{InstanceName: t.o.Instance, RootDigest: t.putMessage(ctx, t.directory(nil)), PageToken: "nobody gave this", DigestFunction: t.function()})
			if err == nil {
				_, err = s.Recv()
			}
			t.want("GetTree with a token of nobody", err, codes.InvalidArgument)
		}},
		{Name: "get_tree/no_directory", Clause: "The digest of the root, which must be an encoded", Needs: cas, run: func(ctx context.Context, t *T) {
			d := t.put(ctx, []byte("\xff\xff this is no Directory "+t.salt))
			_, _, err := t.getTree(ctx, d, 0)
			if err == nil {
				t.errorf("GetTree of bytes that are no Directory succeeds")
			}
		}},
		{Name: "get_tree/large", Clause: enumerate, Needs: cas, run: func(ctx context.Context, t *T) {
			// More than fits into one message of 4 MiB.
			children := map[string]*repb.Digest{}
			var names []string
			for i := range 30 {
				d := &repb.Directory{}
				for j := range 2500 {
					d.Files = append(d.Files, &repb.FileNode{Name: fmt.Sprintf("file-with-a-name-%d-%05d", i, j), Digest: t.digest([]byte{byte(i), byte(j)})})
				}
				names = append(names, fmt.Sprintf("d%02d", i))
				children[names[i]] = t.putMessage(ctx, d)
			}
			got, _, err := t.getTree(ctx, t.putMessage(ctx, t.directory(children, names...)), 0)
			t.ok("GetTree of more than a message", err)
			if len(got) != 31 {
				t.errorf("%d directories, there are 31", len(got))
			}
		}},
	}
}
