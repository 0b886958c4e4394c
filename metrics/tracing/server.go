package tracing

import (
	"context"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/metrics/spans"
)

// metadataHeader carries RequestMetadata (remote_execution.proto).
const metadataHeader = "build.bazel.remote.execution.v2.requestmetadata-bin"

// ServerOptions are for grpc.NewServer, before those of package metrics, whose
// exemplars are of these traces. There are none where nothing is recorded.
func (t *Tracer) ServerOptions() []grpc.ServerOption {
	if !t.On() {
		return nil
	}
	return []grpc.ServerOption{grpc.ChainUnaryInterceptor(t.unaryServer), grpc.ChainStreamInterceptor(t.streamServer)}
}

func (t *Tracer) unaryServer(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	ctx, span := t.accept(ctx, info.FullMethod)
	if span == nil {
		return h(ctx, req)
	}
	ended := false
	defer func() { endPanic(span, ended) }()
	resp, err := h(ctx, req)
	endServed(span, err)
	ended = true
	return resp, err
}

func (t *Tracer) streamServer(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
	ctx, span := t.accept(ss.Context(), info.FullMethod)
	if ctx != ss.Context() {
		ss = &tracedStream{ServerStream: ss, ctx: ctx}
	}
	if span == nil {
		return h(srv, ss)
	}
	ended := false
	defer func() { endPanic(span, ended) }()
	err := h(srv, ss)
	endServed(span, err)
	ended = true
	return err
}

// endPanic ends the span of a handler that panicked beyond package metrics.
func endPanic(s trace.Span, ended bool) {
	if !ended {
		spans.Fail(s, "panic")
		s.End()
	}
}

// tracedStream is a stream with the trace in its context.
type tracedStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // that of the stream, as gRPC has it
}

// Context implements grpc.ServerStream.
func (s *tracedStream) Context() context.Context { return s.ctx }

// accept finds the trace of an incoming call, and begins its span; nil: it is not
// recorded.
func (t *Tracer) accept(ctx context.Context, method string) (context.Context, trace.Span) {
	if strings.HasPrefix(method, "/grpc.") { // health checks and reflection
		return ctx, nil
	}
	incoming := func(name string) string {
		if vs := metadata.ValueFromIncomingContext(ctx, name); len(vs) > 0 {
			return vs[0]
		}
		return ""
	}
	who := incoming(metadataHeader)
	ctx, span := t.start(ctx, t.originOf(incoming, who), strings.TrimPrefix(method, "/"), trace.SpanKindServer)
	if span != nil {
		span.SetAttributes(append(ofMethod(method), ofClient(who)...)...)
	}
	return ctx, span
}

// ofMethod are the attributes of a call of a method: /package.Service/Method.
func ofMethod(full string) []attribute.KeyValue {
	service, method, _ := strings.Cut(strings.TrimPrefix(full, "/"), "/")
	return append(make([]attribute.KeyValue, 0, 12),
		attribute.String("rpc.system", "grpc"), attribute.String("rpc.service", spans.Clip(service)), attribute.String("rpc.method", spans.Clip(method)))
}

// ofClient are the attributes that say what RequestMetadata does.
func ofClient(requestMetadata string) []attribute.KeyValue {
	if requestMetadata == "" || len(requestMetadata) > maxMetadata {
		return nil
	}
	md := &repb.RequestMetadata{}
	if err := proto.Unmarshal([]byte(requestMetadata), md); err != nil {
		return nil // it informs, and no call fails for it
	}
	var all []attribute.KeyValue
	for _, f := range [...]struct{ key, value string }{
		{"reapi.tool", strings.TrimSpace(md.GetToolDetails().GetToolName() + " " + md.GetToolDetails().GetToolVersion())},
		{"reapi.invocation", md.GetToolInvocationId()},
		{"reapi.correlated_invocations", md.GetCorrelatedInvocationsId()},
		{"reapi.action_id", md.GetActionId()},
		{"reapi.mnemonic", md.GetActionMnemonic()},
		{"reapi.target", md.GetTargetId()},
		{"reapi.configuration", md.GetConfigurationId()},
	} {
		if f.value != "" {
			all = append(all, attribute.String(f.key, spans.Clip(f.value)))
		}
	}
	return all
}

// endServed ends the span of a call that came in, with its status. That something is
// not there, or is there already, is an answer and no failure.
func endServed(s trace.Span, err error) { end(s, err, codes.OK, codes.NotFound, codes.AlreadyExists) }

// endMade is the same of a call that went out. To end one is no failure either: a
// reader does so that has all it wants.
func endMade(s trace.Span, err error) {
	end(s, err, codes.OK, codes.NotFound, codes.AlreadyExists, codes.Canceled)
}

// end ends a span. The good codes are no failures.
func end(s trace.Span, err error, good ...codes.Code) {
	st, ok := status.FromError(err)
	if !ok {
		st = status.FromContextError(err)
	}
	s.SetAttributes(attribute.Int64("rpc.grpc.status_code", int64(st.Code())))
	if !slices.Contains(good, st.Code()) {
		spans.Fail(s, st.Code().String()+": "+st.Message())
	}
	s.End()
}
