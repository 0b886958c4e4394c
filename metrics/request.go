package metrics

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"strconv"
	"sync/atomic"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

const (
	// RequestHeader has the name of a call: servers of ours pass it on with the calls
	// that they make for it, and give it to the client in the trailer of an error.
	RequestHeader = "mettle-request"
	// OperationHeader has the name of the operation that a worker makes a call for.
	OperationHeader = "mettle-operation"
	// maxName bounds both, as others may send them too.
	maxName = 512
)

// request is a call that a server handles, and its context, for a call of a few
// microseconds notices two allocations. Its name is made when somebody asks.
type request struct {
	context.Context //nolint:containedctx // it is one
	rpc             *RPC
	n               uint64
	caller          atomic.Pointer[string]
}

type requestKey struct{}

// Value implements context.Context.
func (r *request) Value(key any) any {
	if _, ok := key.(requestKey); ok {
		return r
	}
	return r.Context.Value(key)
}

// newPrefix tells the calls of one process from those of others.
func newPrefix() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // it never fails
	return hex.EncodeToString(b[:])
}

func (r *RPC) named(ctx context.Context) *request {
	return &request{Context: ctx, rpc: r, n: r.calls.Add(1)}
}

// Request is the name of the call of ctx: the one that a server of ours gave it who
// passed it on, else this server's. "": ctx is of no call.
func Request(ctx context.Context) string {
	r, _ := ctx.Value(requestKey{}).(*request)
	if r == nil {
		return ""
	}
	if name := header(ctx, RequestHeader); name != "" {
		return name
	}
	return r.rpc.prefix + "-" + strconv.FormatUint(r.n, 36)
}

// header is what a client says of its call, if that is fit for a log.
func header(ctx context.Context, key string) string {
	vs := metadata.ValueFromIncomingContext(ctx, key)
	if len(vs) == 0 || len(vs[0]) > maxName {
		return ""
	}
	for _, c := range []byte(vs[0]) {
		if c <= ' ' || c > '~' {
			return ""
		}
	}
	return vs[0]
}

// SetCaller says who makes the call of ctx, for its log lines.
func SetCaller(ctx context.Context, name string) {
	if r, _ := ctx.Value(requestKey{}).(*request); r != nil {
		r.caller.Store(&name)
	}
}

// Attrs are what log lines tell of the call of ctx: request, caller, operation, and
// of the client's RequestMetadata the invocation and the action_id. There are none
// of other contexts.
func Attrs(ctx context.Context) []slog.Attr {
	r, _ := ctx.Value(requestKey{}).(*request)
	if r == nil {
		return nil
	}
	attrs := append(make([]slog.Attr, 0, 8), slog.String("request", Request(ctx)))
	if c := r.caller.Load(); c != nil {
		attrs = append(attrs, slog.String("caller", *c))
	}
	if op := header(ctx, OperationHeader); op != "" {
		attrs = append(attrs, slog.String("operation", op))
	}
	return append(attrs, ClientAttrs(RequestMetadata(ctx))...)
}

// ClientAttrs are what log lines tell of a client: its invocation, and what it
// calls the action. Strings are cut at a few hundred bytes.
func ClientAttrs(md *repb.RequestMetadata) []slog.Attr {
	var attrs []slog.Attr
	for _, f := range [...]struct{ key, value string }{{"invocation", md.GetToolInvocationId()}, {"action_id", md.GetActionId()}} {
		if f.value != "" {
			attrs = append(attrs, slog.String(f.key, f.value[:min(len(f.value), maxField)]))
		}
	}
	return attrs
}

// ParseRequestMetadata reads a header as clients send it. It is nil where that is
// absent or malformed, as RequestMetadata says.
func ParseRequestMetadata(data []byte) *repb.RequestMetadata {
	if len(data) == 0 || len(data) > maxMetadata {
		return nil
	}
	m := new(repb.RequestMetadata)
	if err := proto.Unmarshal(data, m); err != nil {
		return nil
	}
	return m
}

// trailer is what the client of a failed call is told beside its error; nil where
// there is no failure, or an everyday one.
func trailer(ctx context.Context, code codes.Code) metadata.MD {
	switch code {
	case codes.OK, codes.NotFound, codes.Canceled, codes.OutOfRange:
		return nil
	}
	return metadata.Pairs(RequestHeader, Request(ctx))
}

// A Headers gives pairs of keys and values to send with a call, by its context.
type Headers func(context.Context) []string

// Passed are the headers of calls that a server makes for the call of ctx: its name,
// and who the client says it is.
func Passed(ctx context.Context) []string {
	name := Request(ctx)
	if name == "" {
		return nil
	}
	if vs := metadata.ValueFromIncomingContext(ctx, metadataHeader); len(vs) > 0 {
		return []string{RequestHeader, name, metadataHeader, vs[0]}
	}
	return []string{RequestHeader, name}
}

// OfAction are the headers of calls that a worker makes for an operation, of whose
// client it has the RequestMetadata.
func OfAction(operation string, md []byte) []string {
	if len(md) == 0 {
		return []string{OperationHeader, operation}
	}
	return []string{OperationHeader, operation, metadataHeader, string(md)}
}

// DialOptions has the calls of a connection send them, but what is sent already. nil
// sends nothing.
func (h Headers) DialOptions() []grpc.DialOption {
	if h == nil {
		return nil
	}
	return []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return call(h.add(ctx), method, req, reply, cc, opts...)
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return open(h.add(ctx), desc, cc, method, opts...)
		}),
	}
}

func (h Headers) add(ctx context.Context) context.Context {
	pairs := h(ctx)
	if len(pairs) == 0 {
		return ctx
	}
	sent, _ := metadata.FromOutgoingContext(ctx)
	kept := make([]string, 0, len(pairs))
	for i := 0; i+1 < len(pairs); i += 2 {
		if len(sent.Get(pairs[i])) == 0 {
			kept = append(kept, pairs[i], pairs[i+1])
		}
	}
	return metadata.AppendToOutgoingContext(ctx, kept...)
}
