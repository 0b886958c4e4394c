package rpc

import (
	"context"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/bazelbuild/remote-apis/build/bazel/semver"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/status"
)

type capabilitiesServer struct {
	repb.UnimplementedCapabilitiesServer
	o Options
}

// GetCapabilities says what this server does for the caller in that instance, and
// not more.
func (s *capabilitiesServer) GetCapabilities(ctx context.Context, req *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
	if _, err := s.o.storeOf(req.InstanceName); err != nil {
		return nil, status.From(err)
	}
	fns := make([]repb.DigestFunction_Value, 0, len(digest.Functions()))
	for _, fn := range digest.Functions() {
		fns = append(fns, fn.Proto())
	}
	capabilities := &repb.ServerCapabilities{
		CacheCapabilities: &repb.CacheCapabilities{
			DigestFunctions:               fns,
			ActionCacheUpdateCapabilities: &repb.ActionCacheUpdateCapabilities{UpdateEnabled: s.o.Updates.MayUpdate(ctx, req.InstanceName) == nil},
			// No priority but the default one means anything to the stores.
			CachePriorityCapabilities: &repb.PriorityCapabilities{
				Priorities: []*repb.PriorityCapabilities_PriorityRange{{MinPriority: 0, MaxPriority: 0}},
			},
			MaxBatchTotalSizeBytes:      s.o.MaxBatchBytes,
			SymlinkAbsolutePathStrategy: repb.SymlinkAbsolutePathStrategy_ALLOWED,
			MaxCasBlobSizeBytes:         s.o.MaxBlobBytes,

			SupportedCompressors:            compressors(),
			SupportedBatchUpdateCompressors: compressors(),
		},
		ExecutionCapabilities: s.o.Execution,
		// Please and Bazel before 7 refuse a server whose lowest version is above
		// theirs, 2.0.
		LowApiVersion:  &semver.SemVer{Major: 2, Minor: 0},
		HighApiVersion: &semver.SemVer{Major: 2, Minor: 13},
	}
	if chunker, err := s.o.chunker(req.InstanceName); err == nil {
		announceChunks(capabilities.CacheCapabilities, chunker.ChunkParams())
	}
	return capabilities, nil
}
