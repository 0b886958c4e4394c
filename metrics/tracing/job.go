package tracing

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/mettle-build/mettle/metrics/spans"
)

// A Job is what a queue tells of one, as far as its trace goes.
type Job struct {
	// Context has the W3C headers, and under KeyPublished when it was published.
	Context map[string]string
	// RequestMetadata is that of the client, as bytes.
	RequestMetadata []byte
	// Attempt is which delivery of the job this is, from 1.
	Attempt uint32
}

// Attempt begins the span of an attempt to run a job, with one that says how long a
// job that is delivered for the first time was in the queue, as far as the clocks of
// the two machines agree. The caller ends the span. Where the job's trace is not
// recorded, or nothing is, the span is one that keeps nothing.
func (t *Tracer) Attempt(ctx context.Context, j Job) (context.Context, trace.Span) {
	if !t.On() {
		return ctx, trace.SpanFromContext(ctx)
	}
	who := string(j.RequestMetadata)
	o := t.originOf(func(name string) string { return j.Context[name] }, who)
	if o.recorded && o.parent.IsValid() && j.Attempt <= 1 {
		t.waited(trace.ContextWithRemoteSpanContext(ctx, o.parent), j.Context[spans.KeyPublished])
	}
	ctx, span := t.start(ctx, o, "attempt", trace.SpanKindConsumer)
	if span == nil {
		return ctx, trace.SpanFromContext(ctx)
	}
	span.SetAttributes(ofClient(who)...)
	spans.Int(span, spans.KeyAttempt, int64(j.Attempt))
	return ctx, span
}

// waited adds the span of the time in the queue, which ends now.
func (t *Tracer) waited(ctx context.Context, published string) {
	since, err := time.Parse(time.RFC3339Nano, published)
	now := time.Now()
	if err != nil || since.After(now) {
		return
	}
	_, s := t.tracer.Start(ctx, "queue", trace.WithTimestamp(since))
	s.End(trace.WithTimestamp(now))
}
