package rpc

import (
	"context"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/bazelbuild/remote-apis/build/bazel/semver"

	"github.com/mettle-build/mettle/elan/digest"
)

type capabilitiesServer struct {
	repb.UnimplementedCapabilitiesServer
	o Options
}

// GetCapabilities says what this server does, and not more.
func (s *capabilitiesServer) GetCapabilities(context.Context, *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
	fns := make([]repb.DigestFunction_Value, 0, len(digest.Functions()))
	for _, fn := range digest.Functions() {
		fns = append(fns, fn.Proto())
	}
	return &repb.ServerCapabilities{
		CacheCapabilities: &repb.CacheCapabilities{
			DigestFunctions:               fns,
			ActionCacheUpdateCapabilities: &repb.ActionCacheUpdateCapabilities{UpdateEnabled: true},
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
		// theirs, 2.0. What 2.12 and 2.13 bring is splitting and splicing, which
		// is not served yet, so 2.11 is the highest.
		LowApiVersion:  &semver.SemVer{Major: 2, Minor: 0},
		HighApiVersion: &semver.SemVer{Major: 2, Minor: 11},
	}, nil
}
