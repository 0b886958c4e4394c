package tracing

import (
	"context"
	"strings"

	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/mettle-build/mettle/metrics/spans"
)

// DialOptions are for connections to servers of ours, whose calls are part of the
// trace that they are made in. There are none where nothing is recorded.
func (t *Tracer) DialOptions() []grpc.DialOption {
	if !t.On() {
		return nil
	}
	return []grpc.DialOption{grpc.WithChainUnaryInterceptor(t.unaryClient), grpc.WithChainStreamInterceptor(t.streamClient)}
}

//nolint:revive // argument-limit: gRPC has it so
func (t *Tracer) unaryClient(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	ctx, span := t.call(ctx, method)
	err := invoke(ctx, method, req, reply, conn, opts...)
	if span != nil {
		endMade(span, err)
	}
	return err
}

//nolint:revive // as above
func (t *Tracer) streamClient(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	ctx, span := t.call(ctx, method)
	if span == nil {
		return open(ctx, desc, conn, method, opts...)
	}
	// However it ends, also where nobody reads it to its end.
	opts = append(opts, grpc.OnFinish(func(err error) { endMade(span, err) }))
	s, err := open(ctx, desc, conn, method, opts...)
	if err != nil {
		endMade(span, err) // a second end is none
	}
	return s, err
}

// call puts the trace of ctx into the headers of an outgoing call, with a span of its
// own where it is recorded, and nil where not.
func (t *Tracer) call(ctx context.Context, method string) (context.Context, trace.Span) {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return ctx, nil
	}
	var span trace.Span
	if trace.SpanFromContext(ctx).IsRecording() {
		ctx, span = t.tracer.Start(ctx, strings.TrimPrefix(method, "/"), trace.WithSpanKind(trace.SpanKindClient))
		span.SetAttributes(ofMethod(method)...)
	}
	md, ok := metadata.FromOutgoingContext(ctx) // a copy
	if !ok {
		md = metadata.MD{}
	}
	// In place of those of the client, where its call is passed on.
	md.Delete("tracestate")
	for k, v := range spans.Headers(ctx) {
		md.Set(k, v)
	}
	return metadata.NewOutgoingContext(ctx, md), span
}
