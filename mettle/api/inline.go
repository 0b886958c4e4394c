package api

import (
	"context"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// maxInlinedBytes bounds what one response gets inlined.
	maxInlinedBytes = 2 << 20
	// maxResultBytes bounds a result with what was inlined into it, so that its
	// message stays under the 4 MiB that gRPC clients take by default.
	maxResultBytes = 4<<20 - 128<<10
	// maxInlinedBlob bounds one of them: a larger one is better streamed.
	maxInlinedBlob = 1 << 20
)

// hints is what a client wants to have inline, if it is no trouble.
type hints struct {
	stdout, stderr bool
	files          map[string]bool
}

func hintsOf(req *repb.ExecuteRequest) hints {
	h := hints{stdout: req.GetInlineStdout(), stderr: req.GetInlineStderr()}
	if paths := req.GetInlineOutputFiles(); len(paths) > 0 {
		h.files = make(map[string]bool, len(paths))
		for _, p := range paths {
			h.files[p] = true
		}
	}
	return h
}

func (h hints) none() bool { return !h.stdout && !h.stderr && len(h.files) == 0 }

// inlineInto is response with what the client wants inline, or as it is where
// that is nothing, or more trouble than it is worth.
func (s *Server) inlineInto(ctx context.Context, c *call, response []byte) []byte {
	if c.hints.none() {
		return response
	}
	res := &repb.ExecuteResponse{}
	if err := proto.Unmarshal(response, res); err != nil || res.GetResult() == nil {
		return response
	}
	s.inline(ctx, c, res.GetResult())
	data, err := proto.Marshal(res)
	if err != nil {
		return response
	}
	return data
}

// inline puts into res what the client wants inline. A blob that cannot be read
// is left out: the client will ask for it, and learn why.
func (s *Server) inline(ctx context.Context, c *call, res *repb.ActionResult) {
	if c.hints.none() {
		return
	}
	room := int64(min(maxInlinedBytes, maxResultBytes-proto.Size(res)))
	fetch := func(p *repb.Digest) []byte {
		d, err := digest.FromProto(c.name.Action.Function(), p)
		if err != nil || d.Size() > min(room, maxInlinedBlob) {
			return nil
		}
		data, err := blob.ReadAll(ctx, c.store(), d, maxInlinedBlob)
		if err != nil {
			s.log.DebugContext(ctx, "blob not inlined", "digest", d, "operation", c.text, "error", err)
			return nil
		}
		room -= d.Size()
		return data
	}
	if c.hints.stdout && len(res.GetStdoutRaw()) == 0 && res.GetStdoutDigest() != nil {
		res.StdoutRaw = fetch(res.GetStdoutDigest())
	}
	if c.hints.stderr && len(res.GetStderrRaw()) == 0 && res.GetStderrDigest() != nil {
		res.StderrRaw = fetch(res.GetStderrDigest())
	}
	for _, f := range res.GetOutputFiles() {
		if c.hints.files[f.GetPath()] && len(f.GetContents()) == 0 {
			f.Contents = fetch(f.GetDigest())
		}
	}
}
