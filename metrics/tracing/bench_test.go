package tracing_test

import (
	"testing"

	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/metadata"

	"github.com/mettle-build/mettle/metrics/tracing"
	"github.com/mettle-build/mettle/metrics/tracing/tracingtest"
)

// BenchmarkServer is what a call costs, over memory: with no tracer, with one that
// records none of the calls, and with one that records all.
func BenchmarkServer(b *testing.B) {
	for name, share := range map[string]float64{"off": -1, "unrecorded": 0, "recorded": 1} {
		b.Run(name, func(b *testing.B) {
			o := tracing.Options{}
			if share >= 0 {
				o = tracing.Options{URL: tracingtest.New(b).URL(), Share: share}
			}
			tr := newTracer(b, o)
			defer closeTracer(b, tr)
			client := serve(b, &service{}, tr, nil)
			ctx := metadata.AppendToOutgoingContext(b.Context(), header, requestMetadata(b, invocation))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := client.QueryWriteStatus(ctx, &bspb.QueryWriteStatusRequest{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
