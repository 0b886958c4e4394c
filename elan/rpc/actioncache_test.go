package rpc_test

import (
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/rpc"
)

func TestActionCache_round_trip(t *testing.T) {
	s := start(t, rpc.Options{})
	out, stdout := s.store.put([]byte("output")), s.store.put([]byte("printed"))
	action := of([]byte("action"))
	r := &repb.ActionResult{
		OutputFiles:  []*repb.OutputFile{{Path: "a/out", Digest: out.Proto()}, {Path: "a/other", Digest: out.Proto()}},
		StdoutDigest: stdout.Proto(),
	}
	got, err := s.actions.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{InstanceName: "one", ActionDigest: action.Proto(), ActionResult: r})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r, got, protocmp.Transform()); diff != "" {
		t.Errorf("update (-want +got)\n%s", diff)
	}
	got, err = s.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{InstanceName: "one", ActionDigest: action.Proto()})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r, got, protocmp.Transform()); diff != "" {
		t.Errorf("get (-want +got)\n%s", diff)
	}
	got, err = s.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{
		InstanceName: "one", ActionDigest: action.Proto(), InlineStdout: true, InlineStderr: true, InlineOutputFiles: []string{"a/out", "b"},
	})
	if err != nil {
		t.Fatal(err)
	}
	r.StdoutRaw = []byte("printed")
	r.OutputFiles[0].Contents = []byte("output")
	if diff := cmp.Diff(r, got, protocmp.Transform()); diff != "" {
		t.Errorf("get inline (-want +got)\n%s", diff)
	}
	_, err = s.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{InstanceName: "two", ActionDigest: action.Proto()})
	wantCode(t, "GetActionResult in another instance", err, codes.NotFound)
}

func TestActionCache_inlines_only_what_fits(t *testing.T) {
	s := start(t, rpc.Options{})
	action := of([]byte("action"))
	r := &repb.ActionResult{StdoutDigest: s.store.put(pattern(5 << 20)).Proto()}
	hint := []string{}
	for _, path := range []string{"a", "b", "c", "d", "e"} {
		r.OutputFiles = append(r.OutputFiles, &repb.OutputFile{Path: path, Digest: s.store.put(pattern(1 << 20)).Proto()})
		hint = append(hint, path)
	}
	if _, err := s.actions.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: action.Proto(), ActionResult: r}); err != nil {
		t.Fatal(err)
	}
	// The client's own limit of 4 MiB is the proof that the reply keeps it.
	got, err := s.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: action.Proto(), InlineStdout: true, InlineOutputFiles: hint})
	if err != nil {
		t.Fatal(err)
	}
	inlined := 0
	for _, f := range got.OutputFiles {
		if len(f.Contents) > 0 {
			inlined++
		}
	}
	if len(got.StdoutRaw) != 0 || inlined != 3 {
		t.Errorf("stdout of %d bytes and %d files are inline, want none and 3", len(got.StdoutRaw), inlined)
	}
}

func TestGetActionResult_refusals(t *testing.T) {
	s := start(t, rpc.Options{})
	_, err := s.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{})
	wantCode(t, "GetActionResult without a digest", err, codes.InvalidArgument)
	_, err = s.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: of([]byte("x")).Proto()})
	wantCode(t, "GetActionResult of nothing", err, codes.NotFound)
	s.store.fail(blob.ErrUnavailable)
	_, err = s.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: of([]byte("x")).Proto()})
	wantCode(t, "GetActionResult of a store that is away", err, codes.Unavailable)
}

func TestUpdateActionResult_refusals(t *testing.T) {
	s := start(t, rpc.Options{})
	action := of([]byte("action")).Proto()
	gone := of([]byte("gone"))
	for _, tc := range []struct {
		name string
		r    *repb.ActionResult
		want codes.Code
	}{
		{"absent", nil, codes.InvalidArgument},
		{"failed", &repb.ActionResult{ExitCode: 1}, codes.InvalidArgument},
		{"malformed digest", &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "a", Digest: &repb.Digest{Hash: "x"}}}}, codes.InvalidArgument},
		{"missing output", &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "a", Digest: gone.Proto()}}}, codes.FailedPrecondition},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := s.actions.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: action, ActionResult: tc.r})
			wantCode(t, "UpdateActionResult", err, tc.want)
			if tc.want != codes.FailedPrecondition {
				return
			}
			details := gstatus.Convert(err).Details()
			want := &errdetails.PreconditionFailure{Violations: []*errdetails.PreconditionFailure_Violation{{Type: "MISSING", Subject: "blobs/" + gone.String()}}}
			if diff := cmp.Diff([]any{want}, details, protocmp.Transform()); diff != "" {
				t.Errorf("details (-want +got)\n%s", diff)
			}
		})
	}
	if len(s.store.entries) != 0 {
		t.Errorf("%d entries were made", len(s.store.entries))
	}
}
