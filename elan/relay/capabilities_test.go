package relay_test

import (
	"context"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/elan/relay"
)

// TestRelay_capabilities: they are the storage's, with what this server executes.
func TestRelay_capabilities(t *testing.T) {
	execution := &repb.ExecutionCapabilities{ExecEnabled: true, DigestFunction: repb.DigestFunction_SHA256}
	f := &fake{}
	s := relayTo(t, relay.Options{Execution: execution, MaxBatchBytes: 5 << 20}, started(t, f.register))
	for _, tc := range []struct {
		name              string
		batch, wantBatch  int64
		storagesExecution *repb.ExecutionCapabilities
	}{
		{"smaller batches", 3 << 20, 3 << 20, nil},
		{"larger batches", 30 << 20, 5 << 20, nil},
		{"batches without a limit", 0, 5 << 20, nil},
		{"a storage that executes", 3 << 20, 3 << 20, &repb.ExecutionCapabilities{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f.capabilities = func(_ context.Context, r *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
				return &repb.ServerCapabilities{
					CacheCapabilities: &repb.CacheCapabilities{
						MaxBatchTotalSizeBytes:        tc.batch,
						ActionCacheUpdateCapabilities: &repb.ActionCacheUpdateCapabilities{UpdateEnabled: r.InstanceName == "i"},
					},
					ExecutionCapabilities: tc.storagesExecution,
				}, nil
			}
			got, err := repb.NewCapabilitiesClient(s.conn).GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{InstanceName: "i"})
			if err != nil {
				t.Fatal(err)
			}
			want := &repb.ServerCapabilities{
				CacheCapabilities: &repb.CacheCapabilities{
					MaxBatchTotalSizeBytes:        tc.wantBatch,
					ActionCacheUpdateCapabilities: &repb.ActionCacheUpdateCapabilities{UpdateEnabled: true},
				},
				ExecutionCapabilities: execution,
			}
			if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
	want := gstatus.Error(codes.PermissionDenied, "not for you")
	f.capabilities = func(context.Context, *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
		return nil, want
	}
	if _, err := repb.NewCapabilitiesClient(s.conn).GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{}); gstatus.Convert(err).Message() != "not for you" {
		t.Errorf("%v, want what the storage says", err)
	}
}
