package api_test

import (
	"context"
	"testing"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	sdkcodes "go.opentelemetry.io/otel/codes"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/metrics/spans"
)

// tracedStream is the server's end of a stream, in a span.
type tracedStream struct {
	grpc.ServerStream
	ctx  context.Context //nolint:containedctx // that of the stream, as gRPC has it
	sent chan *longrunningpb.Operation
}

func (s *tracedStream) Context() context.Context { return s.ctx }

func (s *tracedStream) Send(op *longrunningpb.Operation) error {
	s.sent <- op
	return nil
}

// recorder keeps the spans that have ended.
type recorder struct {
	*tracetest.SpanRecorder
	provider *sdk.TracerProvider
}

func newRecorder() recorder {
	r := tracetest.NewSpanRecorder()
	return recorder{r, sdk.NewTracerProvider(sdk.WithSpanProcessor(r))}
}

// serve is a call of Execute in a span of that name, which ends when the call does.
func (r recorder) serve(t *testing.T, b *bench, name string, req *repb.ExecuteRequest) (*tracedStream, trace.SpanContext, <-chan error) {
	t.Helper()
	ctx, span := r.provider.Tracer("test").Start(t.Context(), name)
	st := &tracedStream{ctx: ctx, sent: make(chan *longrunningpb.Operation, 100)}
	ended := make(chan error, 1)
	go func() {
		err := b.server.Execute(req, st)
		span.End()
		ended <- err
	}()
	return st, span.SpanContext(), ended
}

// byName are the spans that have ended, each of which has a name of its own.
func (r recorder) byName(t *testing.T) map[string]sdk.ReadOnlySpan {
	t.Helper()
	all := map[string]sdk.ReadOnlySpan{}
	for _, s := range r.Ended() {
		name := s.Parent().TraceID().String() + "/" + s.Name()
		if !s.Parent().IsValid() {
			name = s.Name()
		}
		if all[name] != nil {
			t.Errorf("two spans are called %s", name)
		}
		all[name] = s
	}
	return all
}

// A call that shares another one's execution leads to its trace.
func TestExecute_spans(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		r := newRecorder()
		req := &repb.ExecuteRequest{ActionDigest: b.store.action("a"), InstanceName: "i"}
		st, first, firstEnded := r.serve(t, b, "first", req)
		name := (<-st.sent).GetName()
		st, second, secondEnded := r.serve(t, b, "second", req)
		<-st.sent
		l := b.lease()
		parent := "00-" + first.TraceID().String() + "-" + first.SpanID().String() + "-01"
		if got := l.Job().GetTraceContext(); got["traceparent"] != parent || got[spans.KeyPublished] == "" || len(got) != 2 {
			t.Errorf("the job has the trace context %v, want %s", got, parent)
		}
		b.complete(l, &repb.ExecuteResponse{Status: status.New(codes.DeadlineExceeded, "late").Proto()})
		for _, ended := range []<-chan error{firstEnded, secondEnded} {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		all := r.byName(t)
		for _, in := range []struct {
			of    trace.SpanContext
			names []string
		}{{first, []string{"cache lookup", "accept", "publish"}}, {second, []string{"cache lookup", "accept"}}} {
			for _, name := range in.names {
				s := all[in.of.TraceID().String()+"/"+name]
				if s == nil || s.Parent().SpanID() != in.of.SpanID() {
					t.Errorf("no span %q within that of the call", name)
				}
			}
		}
		if len(all) != 7 {
			t.Errorf("%d spans, want 7: %v", len(all), all)
		}
		for name, links := range map[string]int{"first": 0, "second": 1} {
			s := all[name]
			if s.Status().Code != sdkcodes.Error || s.Status().Description != "the action ended with DeadlineExceeded" {
				t.Errorf("the %s call has the status %v", name, s.Status())
			}
			if len(s.Links()) != links || links > 0 && !s.Links()[0].SpanContext.Equal(first) {
				t.Errorf("the %s call has the links %v, want %d, to the first one", name, s.Links(), links)
			}
		}
		got := map[string]string{}
		for _, a := range all["first"].Attributes() {
			got[string(a.Key)] = a.Value.AsString()
		}
		want := map[string]string{
			spans.KeyOperation: spans.Clip(name), spans.KeyAction: parse(req.GetActionDigest()).String(), spans.KeyInstance: "i", spans.KeyOutcome: "timeout",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("attributes (-want +got):\n%s", diff)
		}
	})
}

// Without a trace, what clients send of theirs is passed on as it is, and costs the
// call nothing more.
func TestExecute_noSpans(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a"))
		w.next()
		l := b.lease()
		if got := l.Job().GetTraceContext(); len(got) != 0 {
			t.Errorf("the job has the trace context %v, want none", got)
		}
		b.complete(l, exit(0))
		w.response()
	})
}
