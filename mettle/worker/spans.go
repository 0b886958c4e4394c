//go:build linux

package worker

import (
	"context"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/metrics/spans"
	"github.com/mettle-build/mettle/mettle/queue"
)

// The stages of an attempt, as spans.
const (
	spanFetch   = "fetch inputs"
	spanRun     = "run"
	spanCollect = "collect outputs"
)

// beginSpan begins the span of a lease, where there are traces.
func (s *slot) beginSpan(ctx context.Context, lease queue.Lease) (context.Context, trace.Span) {
	if s.w.o.Trace == nil {
		return ctx, trace.SpanFromContext(context.Background())
	}
	job := lease.Job()
	ctx, span := s.w.o.Trace(ctx, job, lease.Attempt())
	if span.IsRecording() {
		spans.Text(span, spans.KeyOperation, job.GetOperation())
		spans.Text(span, spans.KeyAction, job.GetActionDigest())
		spans.Text(span, spans.KeyInstance, job.GetInstanceName())
		spans.Text(span, spans.KeyPool, job.GetPool())
		spans.Text(span, spans.KeyWorker, s.w.o.Name)
		spans.Int(span, "mettle.slot", int64(s.index))
	}
	return ctx, span
}

// endWithout tells the span of an attempt that there is no response from here.
func endWithout(s trace.Span, outcome string, err error) {
	spans.Text(s, spans.KeyOutcome, outcome)
	spans.Fail(s, err.Error())
}

// describeEnd tells the span of an attempt how it ended. A command that failed, by
// its exit code, is a result as good as others.
func describeEnd(s trace.Span, resp *repb.ExecuteResponse) {
	if !s.IsRecording() {
		return
	}
	spans.Text(s, spans.KeyOutcome, outcome(resp))
	spans.Int(s, spans.KeyExitCode, int64(resp.Result.GetExitCode()))
	if resp.Status.GetCode() != 0 {
		spans.Fail(s, resp.Status.GetMessage())
	}
}

// between adds a span of the time between two timestamps of an action's metadata.
func between(ctx context.Context, name string, start, end *timestamppb.Timestamp) {
	if start != nil && end != nil {
		spans.Between(ctx, name, start.AsTime(), end.AsTime())
	}
}
