package rpc

import (
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/status"
	"github.com/mettle-build/mettle/elan/tree"
	"github.com/mettle-build/mettle/elan/wire"
)

// treeOverhead is what a page holds beside its Directories: the token.
const treeOverhead = 1 << 10

// GetTree streams the Directories below a root, each once, in pages. A page's
// token is the digest of the Directory that follows it, so that a later call
// goes on there, on any server that has the same blobs, with nothing kept here.
func (s *casServer) GetTree(req *repb.GetTreeRequest, stream grpc.ServerStreamingServer[repb.GetTreeResponse]) error {
	store, err := s.o.storeOf(req.InstanceName)
	if err != nil {
		return status.From(err)
	}
	root, err := readDigest(req.DigestFunction, req.RootDigest)
	if err != nil {
		return status.From(err)
	}
	if req.PageSize < 0 {
		return gstatus.Errorf(codes.InvalidArgument, "page_size is %d, want 0 or more", req.PageSize)
	}
	p := pager{send: func(page *wire.TreeResponse) error { return stream.SendMsg(page) }, maxBytes: s.o.MaxMessageBytes - treeOverhead, maxItems: int(req.PageSize), skipTo: req.PageToken}
	w := tree.Walk{Opener: store, MaxDirectoryBytes: int64(s.o.MaxMessageBytes) - 2*treeOverhead}
	if err := w.EachEncoded(stream.Context(), root, p.add); err != nil {
		return status.FromRead(err)
	}
	if p.skipTo != "" {
		return gstatus.Errorf(codes.InvalidArgument, "page_token %.200q was not given for the tree of %s, or what it stood for is gone: start without a token", p.skipTo, root)
	}
	return stream.SendMsg(p.page) //nolint:wrapcheck // a status already
}

// pager makes pages of a sequence of Directories.
type pager struct {
	send     func(*wire.TreeResponse) error
	maxBytes int
	maxItems int // 0: only maxBytes counts

	skipTo string // the token at which to begin; empty from there on
	page   *wire.TreeResponse
	bytes  int
}

// add takes the next Directory, and sends the page before it if it is full.
func (p *pager) add(d digest.Digest, encoded []byte) error {
	if p.page == nil {
		p.page = &wire.TreeResponse{}
	}
	if p.skipTo != "" {
		if p.skipTo != d.String() {
			return nil
		}
		p.skipTo = ""
	}
	size := len(encoded) + 8 // and its tag and length
	full := p.bytes+size > p.maxBytes || (p.maxItems > 0 && p.page.Len() >= p.maxItems)
	if full && p.page.Len() > 0 {
		p.page.NextPageToken = d.String()
		if err := p.send(p.page); err != nil {
			return err
		}
		p.page, p.bytes = &wire.TreeResponse{}, 0
	}
	p.page.Add(encoded)
	p.bytes += size
	return nil
}
