package conform

import (
	"context"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

//nolint:revive // a table
func capabilitiesCases() []Case {
	return []Case{
		{
			Name: "capabilities/what_is_served", Clause: "Only the capabilities of the services supported by the endpoint will be returned",
			run: func(_ context.Context, t *T) {
				if t.caps.CacheCapabilities == nil && t.caps.ExecutionCapabilities == nil {
					t.errorf("there are neither cache_capabilities nor execution_capabilities")
				}
			},
		},
		{
			Name: "capabilities/execution_has_a_cache", Clause: "Execution + CAS + Action Cache endpoints should return both CacheCapabilities and ExecutionCapabilities.",
			Level: Should, Needs: []need{needsExecution},
			run: func(_ context.Context, t *T) {
				if t.caps.CacheCapabilities == nil {
					t.errorf("there are execution_capabilities and no cache_capabilities")
				}
			},
		},
		{
			Name: "capabilities/versions", Clause: "Earliest non-deprecated RE API version supported.",
			run: func(_ context.Context, t *T) {
				low, high := t.caps.LowApiVersion, t.caps.HighApiVersion
				if low == nil || high == nil {
					t.fatalf("low_api_version is %v, high_api_version %v; want both", low, high)
				}
				if low.Major > high.Major || low.Major == high.Major && low.Minor > high.Minor {
					t.errorf("low_api_version %v is above high_api_version %v", low, high)
				}
				if d := t.caps.DeprecatedApiVersion; d != nil && (d.Major > low.Major || d.Major == low.Major && d.Minor > low.Minor) {
					t.errorf("deprecated_api_version %v is above low_api_version %v", d, low)
				}
			},
		},
		{
			Name: "capabilities/version_2", Clause: "Latest RE API version supported.",
			run: func(_ context.Context, t *T) {
				if t.caps.GetHighApiVersion().GetMajor() < 2 {
					t.errorf("high_api_version is %v, and these calls are of version 2", t.caps.HighApiVersion)
				}
			},
		},
		{
			Name: "capabilities/digest_functions", Clause: "All the digest functions supported by the remote cache.", Needs: []need{needsCache},
			run: func(_ context.Context, t *T) {
				if len(t.caps.CacheCapabilities.DigestFunctions) == 0 {
					t.errorf("digest_functions is empty")
				}
			},
		},
		{
			Name: "capabilities/no_unknown_function", Clause: "It is an error for the server to return this value.",
			run: func(_ context.Context, t *T) {
				if slices.Contains(t.caps.GetCacheCapabilities().GetDigestFunctions(), repb.DigestFunction_UNKNOWN) ||
					slices.Contains(t.caps.GetExecutionCapabilities().GetDigestFunctions(), repb.DigestFunction_UNKNOWN) {
					t.errorf("digest_functions has UNKNOWN")
				}
				if e := t.caps.ExecutionCapabilities; e != nil && e.DigestFunction == repb.DigestFunction_UNKNOWN {
					t.errorf("digest_function of the execution is UNKNOWN, which older clients read")
				}
			},
		},
		{
			Name: "capabilities/symlinks", Clause: "Whether absolute symlink targets are supported.", Needs: []need{needsCache},
			run: func(_ context.Context, t *T) {
				if t.caps.CacheCapabilities.SymlinkAbsolutePathStrategy == repb.SymlinkAbsolutePathStrategy_UNKNOWN {
					t.errorf("symlink_absolute_path_strategy is UNKNOWN, an invalid value")
				}
			},
		},
		{
			Name: "capabilities/limits", Clause: "Maximum total size of blobs to be uploaded/downloaded using batch methods.", Needs: []need{needsCache},
			run: func(_ context.Context, t *T) {
				if n := t.caps.CacheCapabilities.MaxBatchTotalSizeBytes; n < 0 {
					t.errorf("max_batch_total_size_bytes is %d", n)
				}
				if n := t.caps.CacheCapabilities.MaxCasBlobSizeBytes; n < 0 {
					t.errorf("max_cas_blob_size_bytes is %d", n)
				}
			},
		},
		{
			Name: "capabilities/priorities", Clause: "The minimum numeric value for this priority range, which represents the most urgent task or longest retained item.",
			run: func(_ context.Context, t *T) {
				for _, c := range []*repb.PriorityCapabilities{
					t.caps.GetCacheCapabilities().GetCachePriorityCapabilities(), t.caps.GetExecutionCapabilities().GetExecutionPriorityCapabilities(),
				} {
					for _, r := range c.GetPriorities() {
						if r.MinPriority > r.MaxPriority {
							t.errorf("a range of priorities goes from %d to %d", r.MinPriority, r.MaxPriority)
						}
					}
				}
			},
		},
		{
			Name: "capabilities/fast_cdc_parameters", Clause: "The value MUST be between 1 KiB and 8 MiB.",
			run: func(_ context.Context, t *T) {
				p := t.caps.GetCacheCapabilities().GetFastCdc_2020Params()
				if p == nil {
					t.skipf("the server announces no FastCDC")
				}
				if n := p.AvgChunkSizeBytes; n < 1<<10 || n > 8<<20 {
					t.errorf("avg_chunk_size_bytes is %d", n)
				}
			},
		},
		{
			Name: "capabilities/rep_max_cdc_parameters", Clause: "The value MUST be at least 64 bytes (the Gear hash window size).",
			run: func(_ context.Context, t *T) {
				p := t.caps.GetCacheCapabilities().GetRepMaxCdcParams()
				if p == nil {
					t.skipf("the server announces no RepMaxCDC")
				}
				if n := p.MinChunkSizeBytes; n < 64 {
					t.errorf("min_chunk_size_bytes is %d", n)
				}
			},
		},
		{
			Name: "capabilities/same_functions", Clause: "Remote cache may support multiple digest functions simultaneously.", Needs: []need{needsCache, needsExecution},
			run: func(_ context.Context, t *T) {
				e := t.caps.ExecutionCapabilities
				for _, fn := range append(e.DigestFunctions, e.DigestFunction) {
					if !slices.Contains(t.caps.CacheCapabilities.DigestFunctions, fn) {
						t.errorf("%v is announced for execution and not for the cache, which has the inputs", fn)
					}
				}
			},
		},
		{
			Name: "capabilities/stable", Clause: "GetCapabilities returns the server capabilities configuration of the remote endpoint.",
			run: func(ctx context.Context, t *T) {
				for range 5 {
					c, err := t.calls.caps.GetCapabilities(ctx, &repb.GetCapabilitiesRequest{InstanceName: t.o.Instance})
					t.ok("GetCapabilities", err)
					if !slices.Equal(c.GetCacheCapabilities().GetDigestFunctions(), t.caps.GetCacheCapabilities().GetDigestFunctions()) {
						t.errorf("digest_functions were %v, and are %v", t.caps.GetCacheCapabilities().GetDigestFunctions(), c.GetCacheCapabilities().GetDigestFunctions())
					}
				}
			},
		},
	}
}
