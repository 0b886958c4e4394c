package api

import (
	"context"
	"net"
	"testing"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/operation"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// FuzzInline: a response of a worker is passed on with what the client wants to have
// in it, and otherwise as it is.
func FuzzInline(f *testing.F) {
	data := []byte("data")
	d := digest.Of(digest.SHA256, data)
	s := newServer(f, blobs{d: data}, nil)
	c := &call{s: s, hints: hints{stdout: true, stderr: true, files: map[string]bool{"a": true}}}
	c.setName(operation.NewName(operation.Name{Action: d}))
	f.Add(marshal(f, &repb.ExecuteResponse{Result: &repb.ActionResult{
		StdoutDigest: d.Proto(), StderrRaw: []byte("e"), OutputFiles: []*repb.OutputFile{{Path: "a", Digest: d.Proto()}, {Path: "b"}},
	}}))
	f.Add(marshal(f, &repb.ExecuteResponse{Result: &repb.ActionResult{StdoutDigest: &repb.Digest{Hash: d.Hash(), SizeBytes: -1}}}))
	f.Add([]byte("\xff"))
	f.Fuzz(func(t *testing.T, response []byte) {
		was, is := &repb.ExecuteResponse{}, &repb.ExecuteResponse{}
		got := s.inlineInto(t.Context(), c, response)
		if proto.Unmarshal(response, was) != nil {
			if string(got) != string(response) {
				t.Errorf("%x becomes %x", response, got)
			}
			return
		}
		if err := proto.Unmarshal(got, is); err != nil {
			t.Fatal(err)
		}
		if r := is.GetResult(); r.GetStdoutDigest().GetHash() == d.Hash() && r.GetStdoutDigest().GetSizeBytes() == d.Size() && len(r.GetStdoutRaw()) == 0 {
			t.Errorf("stdout is not in %v", r)
		}
		if a, b := was.GetResult(), is.GetResult(); a != nil && (a.ExitCode != b.ExitCode || len(a.OutputFiles) != len(b.OutputFiles)) {
			t.Errorf("%v becomes %v", was, is)
		}
	})
}

// FuzzSchedule: what a client says of its build can't be more than a queue takes.
func FuzzSchedule(f *testing.F) {
	s := newServer(f, blobs{}, nil)
	c := &call{s: s}
	c.setName(operation.NewName(operation.Name{Action: digest.Empty(digest.SHA256)}))
	f.Add(marshal(f, &repb.RequestMetadata{ToolInvocationId: "i", TargetId: "//a", ActionMnemonic: "m"}), marshal(f, &repb.Command{Arguments: []string{"cc"}, OutputPaths: []string{"o"}}), "10.0.0.1:5")
	f.Add([]byte("\xff"), []byte{}, "")
	f.Fuzz(func(t *testing.T, md, command []byte, addr string) {
		cmd := &repb.Command{}
		if proto.Unmarshal(command, cmd) != nil {
			return
		}
		ctx := peer.NewContext(context.Background(), &peer.Peer{Addr: &net.UnixAddr{Name: addr}})
		job := &queuepb.Job{RequestMetadata: md}
		s.schedule(ctx, c, job, cmd)
		if len(job.Invocation) > maxInvocationBytes || !utf8.ValidString(job.Invocation) {
			t.Errorf("invocation %q", job.Invocation)
		}
	})
}
