package spans_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.opentelemetry.io/otel/codes"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/mettle-build/mettle/metrics/spans"
)

// recorded is a context with a span that is recorded, and what records.
func recorded(t testing.TB) (context.Context, *tracetest.SpanRecorder) {
	t.Helper()
	r := tracetest.NewSpanRecorder()
	ctx, _ := sdk.NewTracerProvider(sdk.WithSpanProcessor(r)).Tracer("test").Start(t.Context(), "parent")
	return ctx, r
}

func TestStart(t *testing.T) {
	ctx, r := recorded(t)
	inside, s := spans.Start(ctx, "child")
	spans.Text(s, "long", strings.Repeat("é", 1000))
	spans.Text(s, "none", "")
	spans.Int(s, "n", 7)
	_, grandchild := spans.Start(inside, "grandchild")
	spans.End(grandchild, nil)
	spans.End(s, errors.New("broken"))
	begin := time.Now().Add(-time.Minute)
	spans.Between(ctx, "past", begin, begin.Add(time.Second))
	spans.Between(ctx, "backwards", begin, begin.Add(-time.Second))
	ended := r.Ended()
	if len(ended) != 3 {
		t.Fatalf("%d spans, want 3: %v", len(ended), ended)
	}
	child, past := ended[1], ended[2]
	if ended[0].Parent().SpanID() != child.SpanContext().SpanID() || child.Parent().SpanID() != trace.SpanContextFromContext(ctx).SpanID() {
		t.Error("the spans are not within each other")
	}
	if s := child.Status(); s.Code != codes.Error || s.Description != "broken" {
		t.Errorf("status %v", s)
	}
	if a := child.Attributes(); len(a) != 2 || len(a[0].Value.AsString()) > spans.MaxText || !utf8.ValidString(a[0].Value.AsString()) {
		t.Errorf("attributes %v", a)
	}
	if !past.StartTime().Equal(begin) || past.EndTime().Sub(past.StartTime()) != time.Second {
		t.Errorf("from %v to %v, want a second from %v on", past.StartTime(), past.EndTime(), begin)
	}
}

// Where nothing is recorded, nothing is allocated, and the span of the context, which
// is another one's, is not ended.
func TestStart_unrecorded(t *testing.T) {
	sc := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}})
	var h prometheus.Observer = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "x", Help: "X."})
	for name, ctx := range map[string]context.Context{"none": t.Context(), "not recorded": trace.ContextWithSpanContext(t.Context(), sc)} {
		if allocs := testing.AllocsPerRun(100, func() {
			inside, s := spans.Start(ctx, "child")
			spans.Text(s, "k", "v")
			spans.Int(s, "n", 1)
			spans.End(s, nil)
			spans.Observe(inside, h, 1)
		}); allocs > 0 {
			t.Errorf("%s: %v allocations", name, allocs)
		}
		if inside, _ := spans.Start(ctx, "child"); inside != ctx {
			t.Errorf("%s: another context", name)
		}
	}
}

func TestHeaders(t *testing.T) {
	if h := spans.Headers(t.Context()); h != nil {
		t.Errorf("without a trace: %v", h)
	}
	ctx, _ := recorded(t)
	sc := trace.SpanContextFromContext(ctx)
	if h := spans.Headers(ctx); len(h) != 1 || h["traceparent"] != "00-"+sc.TraceID().String()+"-"+sc.SpanID().String()+"-01" {
		t.Errorf("headers %v of %v", h, sc)
	}
}

func TestObserve(t *testing.T) {
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "x", Help: "X.", Buckets: []float64{1}})
	spans.Observe(t.Context(), h, 0.5)
	if e := exemplar(t, h); e != nil {
		t.Errorf("without a trace, the exemplar %v", e)
	}
	ctx, _ := recorded(t)
	spans.Observe(ctx, h, 0.5)
	want := trace.SpanContextFromContext(ctx).TraceID().String()
	if e := exemplar(t, h); len(e.GetLabel()) != 1 || e.GetLabel()[0].GetName() != "trace_id" || e.GetLabel()[0].GetValue() != want {
		t.Errorf("the exemplar %v, want trace_id %s", e, want)
	}
}

// exemplar is that of the first bucket.
func exemplar(t *testing.T, h prometheus.Histogram) *dto.Exemplar {
	t.Helper()
	m := &dto.Metric{}
	if err := h.Write(m); err != nil {
		t.Fatal(err)
	}
	return m.GetHistogram().GetBucket()[0].GetExemplar()
}

func BenchmarkStart(b *testing.B) {
	traced, _ := recorded(b)
	for name, ctx := range map[string]context.Context{"off": b.Context(), "recorded": traced} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, s := spans.Start(ctx, "child")
				spans.End(s, nil)
			}
		})
	}
}
