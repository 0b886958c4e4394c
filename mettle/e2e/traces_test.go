package e2e_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/metrics/tracing/tracingtest"
)

const (
	invocation = "2e62f5e0-2a3a-4a3d-9c3b-0d0d4f7d6a11"
	traceID    = "2e62f5e02a3a4a3d9c3b0d0d4f7d6a11"
)

// asBazel is the context of a call that Bazel makes.
func asBazel(t *testing.T) context.Context {
	t.Helper()
	data, err := proto.Marshal(&repb.RequestMetadata{
		ToolDetails: &repb.ToolDetails{ToolName: "bazel", ToolVersion: "9.9.9"}, ToolInvocationId: invocation,
		CorrelatedInvocationsId: "all-of-today", ActionId: "abc", ActionMnemonic: "Genrule", TargetId: "//a:b", ConfigurationId: "cfg",
	})
	if err != nil {
		t.Fatal(err)
	}
	return metadata.AppendToOutgoingContext(t.Context(), "build.bazel.remote.execution.v2.requestmetadata-bin", string(data))
}

// executeAsBazel runs an action to its end.
func executeAsBazel(t *testing.T, c connected, d digest.Digest) *repb.ExecuteResponse {
	t.Helper()
	stream, err := repb.NewExecutionClient(c.conn).Execute(asBazel(t), &repb.ExecuteRequest{ActionDigest: d.Proto()})
	if err != nil {
		t.Fatal(err)
	}
	for {
		op, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if !op.GetDone() {
			continue
		}
		resp := &repb.ExecuteResponse{}
		if err := op.GetResponse().UnmarshalTo(resp); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %v", err)
		}
		return resp
	}
}

// ofBuild are the spans of the one build, without what is there on a slow machine
// only: a look for a result of a job that had to wait, and what a command prints that
// takes its time.
func ofBuild(spans []tracingtest.Span) []tracingtest.Span {
	byID := map[string]tracingtest.Span{}
	for _, s := range spans {
		byID[s.ID] = s
	}
	waited := func(s tracingtest.Span) bool { return s.Name == "cache lookup" && byID[s.Parent].Name == "attempt" }
	slow := func(s tracingtest.Span) bool {
		if waited(s) {
			return true
		}
		for p, ok := byID[s.Parent]; ok; p, ok = byID[p.Parent] {
			if p.Name == "run" || waited(p) {
				return true
			}
		}
		return false
	}
	return slices.DeleteFunc(spans, func(s tracingtest.Span) bool { return s.Trace != traceID || slow(s) })
}

func terminate(t *testing.T, servers ...*server) {
	t.Helper()
	for _, s := range servers {
		ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
		if err := s.Terminate(ctx); err != nil {
			t.Errorf("%s ended with %v", s.kind(), err)
		}
		cancel()
	}
}

func named(t *testing.T, spans []tracingtest.Span, name string) tracingtest.Span {
	t.Helper()
	for _, s := range spans {
		if s.Name == name || strings.HasSuffix(s.Name, "/"+name) {
			return s
		}
	}
	t.Fatalf("no span %q in\n%s", name, tracingtest.Tree(spans))
	return tracingtest.Span{}
}

// checkAttributes holds what the spans of an Execute of asBazel say.
func checkAttributes(t *testing.T, spans []tracingtest.Span, d digest.Digest) {
	t.Helper()
	want := map[string]string{
		"reapi.tool": "bazel 9.9.9", "reapi.invocation": invocation, "reapi.correlated_invocations": "all-of-today", "reapi.action_id": "abc",
		"reapi.mnemonic": "Genrule", "reapi.target": "//a:b", "reapi.configuration": "cfg", "reapi.action_digest": d.String(),
	}
	for _, name := range []string{"Execute", "attempt"} {
		got := named(t, spans, name).Attributes
		for k, v := range want {
			if got[k] != v {
				t.Errorf("span %s has %s %q, want %q", name, k, got[k], v)
			}
		}
	}
	if got := named(t, spans, "attempt").Attributes; got["mettle.exit_code"] != "0" || got["mettle.outcome"] != "success" || got["mettle.attempt"] != "1" {
		t.Errorf("the attempt's span has %v", got)
	}
	for _, s := range spans {
		// Of a blob that is read, the reader ends the call when it has all.
		if s.End.Before(s.Start) || s.Error != "" && !strings.HasSuffix(s.Name, "ByteStream/Read") {
			t.Errorf("span %s from %v to %v, error %q", s.Name, s.Start, s.End, s.Error)
		}
	}
}

// TestTraces_dual: one Execute is one tree, in the trace of the client's invocation.
func TestTraces_dual(t *testing.T) {
	collector := tracingtest.New(t)
	s := startDual(t, storeDir(t), "--trace_otlp="+collector.URL())
	c := s.client(t)
	d := putAction(t, c.client, "echo hi > out")
	if resp := executeAsBazel(t, c, d); resp.GetStatus().GetCode() != 0 || resp.GetResult().GetExitCode() != 0 {
		t.Fatalf("response %v", resp)
	}
	terminate(t, s)
	spans := ofBuild(collector.Spans())
	const want = `mettle-dual server: build.bazel.remote.execution.v2.Execution/Execute
  mettle-dual internal: cache lookup
  mettle-dual internal: accept
  mettle-dual internal: publish
  mettle-dual internal: queue
  mettle-dual consumer: attempt
    mettle-dual internal: fetch inputs
    mettle-dual internal: run
    mettle-dual internal: collect outputs
    mettle-dual internal: store result
    mettle-dual internal: report
`
	if diff := cmp.Diff(want, tracingtest.Tree(spans)); diff != "" {
		t.Errorf("spans (-want +got):\n%s\n%s", diff, tracingtest.Tree(spans))
	}
	checkAttributes(t, spans, d)
}

// TestTraces_fleet: the same through a broker, with what each server asks of the
// storage, and what that does.
func TestTraces_fleet(t *testing.T) {
	collector := tracingtest.New(t)
	f := newFleet(t)
	worker := f.worker(7)
	for _, s := range []*server{f.elan, f.api, worker} {
		s.args = append(s.args, "--trace_otlp="+collector.URL())
	}
	for _, s := range []*server{f.broker, f.elan, f.api, worker} {
		s.Start()
	}
	awaitReady(t, f.api)
	awaitReady(t, worker)
	c := f.api.client(t)
	d := putAction(t, c.client, "echo hi > out")
	if resp := executeAsBazel(t, c, d); resp.GetStatus().GetCode() != 0 || resp.GetResult().GetExitCode() != 0 {
		t.Fatalf("response %v", resp)
	}
	if _, err := repb.NewContentAddressableStorageClient(c.conn).FindMissingBlobs(asBazel(t), &repb.FindMissingBlobsRequest{BlobDigests: []*repb.Digest{d.Proto()}}); err != nil {
		t.Fatal(err)
	}
	terminate(t, worker, f.api, f.elan)
	spans := ofBuild(collector.Spans())
	const want = `mettle-api server: build.bazel.remote.execution.v2.Execution/Execute
  mettle-api internal: cache lookup
    mettle-api client: build.bazel.remote.execution.v2.ActionCache/GetActionResult
      elan server: build.bazel.remote.execution.v2.ActionCache/GetActionResult
        elan internal: file entry
  mettle-api internal: accept
    mettle-api client: google.bytestream.ByteStream/Read
      elan server: google.bytestream.ByteStream/Read
        elan internal: file open
    mettle-api client: google.bytestream.ByteStream/Read
      elan server: google.bytestream.ByteStream/Read
        elan internal: file open
  mettle-api internal: publish
  mettle-worker internal: queue
  mettle-worker consumer: attempt
    mettle-worker internal: fetch inputs
    mettle-worker internal: run
    mettle-worker internal: collect outputs
      mettle-worker client: build.bazel.remote.execution.v2.Capabilities/GetCapabilities
        elan server: build.bazel.remote.execution.v2.Capabilities/GetCapabilities
      mettle-worker client: build.bazel.remote.execution.v2.ContentAddressableStorage/BatchUpdateBlobs
        elan server: build.bazel.remote.execution.v2.ContentAddressableStorage/BatchUpdateBlobs
          elan internal: file write
    mettle-worker internal: store result
      mettle-worker client: build.bazel.remote.execution.v2.ActionCache/UpdateActionResult
        elan server: build.bazel.remote.execution.v2.ActionCache/UpdateActionResult
          elan internal: file find
          elan internal: file put_entry
    mettle-worker internal: report
mettle-api server: build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs
  mettle-api client: build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs
    elan server: build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs
      elan internal: file find
`
	if diff := cmp.Diff(want, tracingtest.Tree(spans)); diff != "" {
		t.Errorf("spans (-want +got):\n%s\n%s", diff, tracingtest.Tree(spans))
	}
	checkAttributes(t, spans, d)
}
