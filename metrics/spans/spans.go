// Package spans is what packages of ours need of OpenTelemetry: a span within that
// of the context, the trace of a context as headers, and exemplars, which lead from
// a histogram to a trace.
//
// Spans come from the context alone. Packages need no tracer in their Options: where
// the context has a span that is recorded, its provider makes the others, and where
// it has none, nothing is made and nothing allocated, for some nanoseconds a call.
// So only those begin traces to whom calls and jobs come from outside: see package
// tracing, which the mains wire. This package samples nothing and sends nothing.
package spans

import (
	"context"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// scope is the name under which spans are made.
const scope = "github.com/mettle-build/mettle"

// MaxText bounds a string of a span, in bytes.
const MaxText = 256

// The keys of attributes that several packages set.
const (
	KeyOperation = "reapi.operation"
	KeyAction    = "reapi.action_digest"
	KeyInstance  = "reapi.instance"
	KeyOutcome   = "mettle.outcome"
	KeyAttempt   = "mettle.attempt"
	KeyWorker    = "mettle.worker"
	KeyPool      = "mettle.pool"
	KeyExitCode  = "mettle.exit_code"
	KeyStore     = "elan.store"
	KeyDigest    = "elan.digest"
	KeyDigests   = "elan.digests"
	KeyBytes     = "elan.bytes"
)

// KeyPublished says, in the trace context of a job, when it was given to the queue,
// as RFC 3339 has it.
const KeyPublished = "published"

// Start begins a span within that of ctx, for the caller to End. Where that one is
// not recorded, the context is ctx, and the span takes everything and keeps nothing.
// What is costly to tell is worth telling if the span IsRecording.
func Start(ctx context.Context, name string) (context.Context, trace.Span) {
	parent := trace.SpanFromContext(ctx)
	if !parent.IsRecording() {
		return ctx, nothing
	}
	return tracer(parent).Start(ctx, name)
}

// Between adds a span that has been, within that of ctx.
func Between(ctx context.Context, name string, start, end time.Time) {
	parent := trace.SpanFromContext(ctx)
	if !parent.IsRecording() || start.IsZero() || end.Before(start) {
		return
	}
	_, s := tracer(parent).Start(ctx, name, trace.WithTimestamp(start))
	s.End(trace.WithTimestamp(end))
}

// nothing is a span that is not recorded. The child of another one that is not would
// have its context, and End would be that of a parent.
//
//nolint:gochecknoglobals // it has no state
var nothing = trace.SpanFromContext(context.Background())

func tracer(parent trace.Span) trace.Tracer { return parent.TracerProvider().Tracer(scope) }

// End ends s. An error is its status; nil leaves that as it is.
func End(s trace.Span, err error) {
	if err != nil {
		Fail(s, err.Error())
	}
	s.End()
}

// Fail makes s one that went wrong, as it says.
func Fail(s trace.Span, why string) {
	if s.IsRecording() {
		s.SetStatus(codes.Error, Clip(why))
	}
}

// Text sets an attribute, unless the value is empty. A long one is cut off.
func Text(s trace.Span, key, value string) {
	if value != "" && s.IsRecording() {
		s.SetAttributes(attribute.String(key, Clip(value)))
	}
}

// Int sets an attribute.
func Int(s trace.Span, key string, value int64) {
	if s.IsRecording() {
		s.SetAttributes(attribute.Int64(key, value))
	}
}

// Clip is text as a span may have it: at most MaxText bytes of UTF-8. Of anything
// else a whole batch of spans could not be sent.
func Clip(text string) string {
	return strings.ToValidUTF8(text[:min(len(text), MaxText)], "")
}

// Headers are the W3C headers, traceparent and tracestate, of the trace of ctx,
// whether it is recorded or not; nil where there is none.
func Headers(ctx context.Context) map[string]string {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return nil
	}
	h := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, h)
	return h
}

// Observe is o.Observe(v), with the trace of ctx as the exemplar, if it is recorded.
func Observe(ctx context.Context, o prometheus.Observer, v float64) {
	if sc := trace.SpanContextFromContext(ctx); sc.IsSampled() {
		if e, ok := o.(prometheus.ExemplarObserver); ok {
			e.ObserveWithExemplar(v, prometheus.Labels{"trace_id": sc.TraceID().String()})
			return
		}
	}
	o.Observe(v)
}
