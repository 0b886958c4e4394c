package relay_test

import (
	"context"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/elan/relay"
)

// TestRelay_passesLaterOn: who is over a rate, or meets a storage that is short of
// memory, hears when to come again, at once.
func TestRelay_passesLaterOn(t *testing.T) {
	want, err := gstatus.New(codes.ResourceExhausted, "not so fast").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(3 * time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	calls := 0
	f := &fake{find: func(context.Context, *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
		calls++
		return nil, want.Err()
	}}
	s := relayTo(t, relay.Options{}, started(t, f.register))
	_, err = s.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{})
	if diff := cmp.Diff(want.Proto(), gstatus.Convert(err).Proto(), protocmp.Transform()); diff != "" || calls != 1 {
		t.Errorf("after %d calls, want 1, the status differs (-want +got):\n%s", calls, diff)
	}
}
