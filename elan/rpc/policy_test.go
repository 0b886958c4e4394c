package rpc_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/rpc"
	storepb "github.com/mettle-build/mettle/proto/store"
)

// TestUpdatePolicy: who may not update is told so, before and after.
func TestUpdatePolicy(t *testing.T) {
	for _, c := range []struct {
		policy  string
		allowed map[string]bool
	}{
		{"everyone", map[string]bool{"": true, "main": true, "ci": true}},
		{"nobody", map[string]bool{"": false, "main": false, "ci": false}},
		{"instances:main", map[string]bool{"": false, "main": true, "main/x": false, "ci": false}},
		{"instances:main,,a/b", map[string]bool{"": true, "main": true, "a/b": true, "a": false}},
	} {
		t.Run(c.policy, func(t *testing.T) {
			var p action.UpdatePolicy
			if err := p.UnmarshalText([]byte(c.policy)); err != nil {
				t.Fatal(err)
			}
			s := start(t, rpc.Options{Updates: p})
			for instance, allowed := range c.allowed {
				caps, err := s.capabilities.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{InstanceName: instance})
				if err != nil {
					t.Fatal(err)
				}
				if got := caps.CacheCapabilities.ActionCacheUpdateCapabilities.UpdateEnabled; got != allowed {
					t.Errorf("update_enabled of %q is %v, want %v", instance, got, allowed)
				}
				_, err = s.actions.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{
					InstanceName: instance, ActionDigest: of([]byte("action")).Proto(), ActionResult: &repb.ActionResult{},
				})
				want := codes.OK
				if !allowed {
					want = codes.PermissionDenied
				}
				wantCode(t, "UpdateActionResult in "+instance, err, want)
				if err != nil && !strings.Contains(err.Error(), "may") {
					t.Errorf("%v, want words", err)
				}
			}
		})
	}
}

// TestFailures: a failed result is to be had by who asks for failed ones, and is
// no hit.
func TestFailures(t *testing.T) {
	store := newFakeStore()
	failures, err := action.NewFailures(action.FailuresOptions{Entries: store})
	if err != nil {
		t.Fatal(err)
	}
	s := startOn(t, store, rpc.Options{Failures: failures})
	printed := s.store.put([]byte("no such file"))
	for _, instance := range []string{"", "main", "a/b"} {
		key := blob.EntryKey{Instance: instance, Action: of([]byte("action"))}
		get := func(name string) (*repb.ActionResult, error) {
			return s.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{InstanceName: name, ActionDigest: key.Action.Proto(), InlineStderr: true})
		}
		_, err = get(action.FailedInstance(instance))
		wantCode(t, "a failure that is not there", err, codes.NotFound)
		if err := failures.Put(t.Context(), key, &repb.ExecuteResponse{
			Result: &repb.ActionResult{ExitCode: 3, StderrDigest: printed.Proto()},
			Status: &spb.Status{Code: int32(codes.DeadlineExceeded), Message: "it took too long"},
		}); err != nil {
			t.Fatal(err)
		}
		_, err := get(instance)
		wantCode(t, "the result of a failed action", err, codes.NotFound)
		got, err := get(action.FailedInstance(instance))
		if err != nil {
			t.Fatal(err)
		}
		why := &spb.Status{}
		if aux := got.GetExecutionMetadata().GetAuxiliaryMetadata(); len(aux) != 1 || aux[0].UnmarshalTo(why) != nil || why.Message != "it took too long" {
			t.Errorf("auxiliary metadata %v, want the status", aux)
		}
		if got.ExitCode != 3 || string(got.StderrRaw) != "no such file" {
			t.Errorf("got %v", got)
		}
		update := func(r *repb.ActionResult) error {
			_, err := s.actions.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{
				InstanceName: action.FailedInstance(instance), ActionDigest: key.Action.Proto(), ActionResult: r,
			})
			return err
		}
		wantCode(t, "a result that did not fail, among the failed ones", update(&repb.ActionResult{}), codes.InvalidArgument)
		// A worker elsewhere puts it as it is served.
		got.StderrRaw, got.ExitCode = nil, 4
		wantCode(t, "a failure from elsewhere", update(got), codes.OK)
		if again, err := get(action.FailedInstance(instance)); err != nil || again.ExitCode != 4 || len(again.GetExecutionMetadata().GetAuxiliaryMetadata()) != 1 {
			t.Errorf("got %v, %v, want what was put", again, err)
		}
		_, err = get(instance)
		wantCode(t, "the result of an action that failed elsewhere", err, codes.NotFound)
	}
	none := start(t, rpc.Options{})
	_, err = none.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{InstanceName: action.FailedInstance(""), ActionDigest: of([]byte("a")).Proto()})
	wantCode(t, "a failure where none are kept", err, codes.NotFound)
	_, err = none.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{InstanceName: "actions/failed/blobs", ActionDigest: of([]byte("a")).Proto()})
	wantCode(t, "a failure of an impossible instance", err, codes.InvalidArgument)
}

// TestLimits: what is announced is enforced, in every way in.
func TestLimits(t *testing.T) {
	const limit = 1000
	s := start(t, rpc.Options{MaxBlobBytes: limit, MaxBatchBytes: 5 << 20})
	caps, err := s.capabilities.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if c := caps.CacheCapabilities; c.MaxCasBlobSizeBytes != limit || c.MaxBatchTotalSizeBytes != 5<<20 {
		t.Errorf("announced: %d and %d bytes", c.MaxCasBlobSizeBytes, c.MaxBatchTotalSizeBytes)
	}
	for _, size := range []int{limit, limit + 1} {
		data := pattern(size)
		d := of(data)
		want := codes.OK
		if size > limit {
			want = codes.InvalidArgument
		}
		_, err := s.write(t.Context(), chunks("uploads/u/blobs/"+d.String(), data, size)...)
		wantCode(t, "write", err, want)
		if want != codes.OK && !strings.Contains(err.Error(), "at most 1000 bytes") {
			t.Errorf("%v, want the limit", err)
		}
		// The size that counts is that of the blob, however small it is compressed.
		_, err = s.write(t.Context(), chunks("uploads/u/compressed-blobs/zstd/"+d.String(), []byte("x"), 1)...)
		if size > limit {
			wantCode(t, "compressed write", err, want)
		}
		for _, c := range []repb.Compressor_Value{repb.Compressor_IDENTITY, repb.Compressor_ZSTD} {
			resp, err := s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: []*repb.BatchUpdateBlobsRequest_Request{
				{Digest: d.Proto(), Data: data, Compressor: c},
				{Digest: of([]byte("small")).Proto(), Data: []byte("small")},
			}})
			if err != nil || resp.Responses[1].Status.GetCode() != 0 {
				t.Errorf("a batch with a large blob: %v, %v", resp, err)
			}
			if got := codes.Code(resp.GetResponses()[0].Status.GetCode()); c == repb.Compressor_IDENTITY && got != want || size > limit && got != want {
				t.Errorf("%d bytes in a batch, %v: %v, want %v", size, c, got, want)
			}
		}
	}
	// A batch may be larger than the messages that are sent unasked.
	five := startOn(t, newFakeStore(), rpc.Options{MaxBatchBytes: 5 << 20})
	data := pattern(2 << 20)
	five.store.put(data)
	five.store.put(data[1:])
	resp, err := five.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: []*repb.Digest{of(data).Proto(), of(data[1:]).Proto()}}, grpc.MaxCallRecvMsgSize(6<<20))
	if err != nil || len(resp.Responses) != 2 || len(resp.Responses[1].Data) != len(data)-1 {
		t.Errorf("a batch of 4 MiB: %v", err)
	}
	_, err = five.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: []*repb.Digest{of(data).Proto(), of(data[1:]).Proto(), of(data).Proto()}}, grpc.MaxCallRecvMsgSize(6<<20))
	wantCode(t, "a batch of 6 MiB", err, codes.InvalidArgument)
}

// TestLimits_store: a blob that is larger than the store is refused as one over the
// limit is, when it is begun.
func TestLimits_store(t *testing.T) {
	store, err := mem.New(mem.Options{MaxBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	s := startOver(t, store, rpc.Options{})
	data := pattern(2 << 20)
	_, err = s.write(t.Context(), &bytestream.WriteRequest{ResourceName: "uploads/u/blobs/" + of(data).String(), Data: data[:1000]})
	wantCode(t, "write of more than the store holds", err, codes.InvalidArgument)
	if err != nil && !strings.Contains(err.Error(), "too large") {
		t.Errorf("%v, want words", err)
	}
	resp, err := s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: of(data).Proto(), Data: data}}})
	if err != nil || codes.Code(resp.Responses[0].Status.GetCode()) != codes.InvalidArgument {
		t.Errorf("a batch of more than the store holds: %v, %v", resp, err)
	}
}

// TestUpdateActionResult_producer: a result says who has set it, and a client can't
// say that it was another.
func TestUpdateActionResult_producer(t *testing.T) {
	caller := ""
	via := ""
	s := start(t, rpc.Options{Caller: func(context.Context) (string, string) { return caller, via }})
	forged, err := anypb.New(&storepb.Producer{Identity: "somebody else"})
	if err != nil {
		t.Fatal(err)
	}
	for _, who := range []string{"", "ci", "ci via api"} {
		caller, via, _ = strings.Cut(who, " via ")
		key := of([]byte("action of " + who)).Proto()
		if _, err := s.actions.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: key, ActionResult: &repb.ActionResult{
			ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w", AuxiliaryMetadata: []*anypb.Any{forged}},
		}}); err != nil {
			t.Fatal(err)
		}
		r, err := s.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: key})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, a := range r.ExecutionMetadata.AuxiliaryMetadata {
			p := &storepb.Producer{}
			if err := a.UnmarshalTo(p); err != nil {
				t.Fatal(err)
			}
			if p.Via != "" {
				p.Identity += " via " + p.Via
			}
			got = append(got, p.Identity)
		}
		var want []string
		if who != "" {
			want = []string{who}
		}
		if !slices.Equal(got, want) {
			t.Errorf("the producers are %q, want %q", got, want)
		}
	}
}
