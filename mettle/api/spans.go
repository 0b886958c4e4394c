package api

import (
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/metrics/spans"
	"github.com/mettle-build/mettle/mettle/operation"
)

// describe tells the span of the call, where that is recorded, what it is about.
func (c *call) describe() {
	span := trace.SpanFromContext(c.stream.Context())
	if !span.IsRecording() {
		return
	}
	spans.Text(span, spans.KeyOperation, c.text)
	spans.Text(span, spans.KeyAction, c.name.Action.String())
	spans.Text(span, spans.KeyInstance, c.name.Instance)
}

// link leads from the span of a call to that in which its operation was begun by
// another one: in that trace are its wait in the queue, and its worker.
func (c *call) link(w *operation.Wait) {
	if c.ours {
		return
	}
	span := trace.SpanFromContext(c.stream.Context())
	if !span.IsRecording() {
		return
	}
	if sc := w.Origin(); sc.IsValid() && !sc.Equal(span.SpanContext()) {
		span.AddLink(trace.Link{SpanContext: sc})
	}
}

// describeEnd tells the span of the call how its operation ended: a marshalled
// ExecuteResponse.
func (c *call) describeEnd(response []byte) {
	span := trace.SpanFromContext(c.stream.Context())
	if !span.IsRecording() {
		return
	}
	if code := codeOf(response); code != 0 {
		spans.Fail(span, "the action ended with "+codes.Code(code).String()) //nolint:gosec // a number for people
	}
}
