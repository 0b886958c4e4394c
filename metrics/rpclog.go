package metrics

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

const (
	// metadataHeader carries RequestMetadata (remote_execution.proto).
	metadataHeader = "build.bazel.remote.execution.v2.requestmetadata-bin"
	// maxMetadata bounds the header that is parsed for a log line: the message
	// has seven short strings.
	maxMetadata = 8 << 10
	// maxField bounds one string of a client's in a log line, in bytes.
	maxField = 256
)

// RequestMetadata returns what the client of an incoming call tells of itself:
// its tool, invocation and target. It is nil where the client sent none, or
// one that is malformed: it informs, and no call fails for it. The caller owns
// it; its strings are of any length up to gRPC's limit on headers.
func RequestMetadata(ctx context.Context) *repb.RequestMetadata {
	vs := metadata.ValueFromIncomingContext(ctx, metadataHeader)
	if len(vs) == 0 {
		return nil
	}
	return ParseRequestMetadata([]byte(vs[0]))
}

// call is what a log line tells of the end of one call.
type call struct {
	code codes.Code
	took time.Duration
	err  error
	req  any // the first message of the client; nil: it is not known
}

// named is what a first message names: the message itself may be changed by the next,
// and is large.
type named struct {
	instance, resource string
	digest             *repb.Digest
}

func (n named) GetInstanceName() string       { return n.instance }
func (n named) GetResourceName() string       { return n.resource }
func (n named) GetActionDigest() *repb.Digest { return n.digest }

func onlyNames(m any) any {
	var n named
	if r, ok := m.(interface{ GetInstanceName() string }); ok {
		n.instance = r.GetInstanceName()
	}
	if r, ok := m.(interface{ GetResourceName() string }); ok {
		n.resource = r.GetResourceName()
	}
	n.digest = digestOf(m)
	return n
}

// digestOf is that of the action or the blob that a request is about; nil: of none,
// or of several.
func digestOf(req any) *repb.Digest {
	switch r := req.(type) {
	case interface{ GetActionDigest() *repb.Digest }:
		return r.GetActionDigest()
	case interface{ GetRootDigest() *repb.Digest }:
		return r.GetRootDigest()
	case interface{ GetBlobDigest() *repb.Digest }:
		return r.GetBlobDigest()
	}
	return nil
}

// about is what a request names: an instance, a blob or an action, a resource.
func about(req any) (attrs []slog.Attr) {
	add := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value[:min(len(value), maxField)]))
		}
	}
	if r, ok := req.(interface{ GetInstanceName() string }); ok {
		add("instance", r.GetInstanceName())
	}
	if r, ok := req.(interface{ GetResourceName() string }); ok {
		add("resource", withoutSecret(r.GetResourceName()))
	}
	if d := digestOf(req); d != nil {
		add("digest", fmt.Sprintf("%.200s/%d", d.GetHash(), d.GetSizeBytes()))
	}
	return attrs
}

// withoutSecret is the name of a resource without what lets whoever knows it read or
// write a log stream.
func withoutSecret(resource string) string {
	const logs = "logstreams/"
	if i := strings.LastIndex(resource, logs); i >= 0 {
		return resource[:i+len(logs)] + "..."
	}
	return resource
}

// logCall writes the line of one call, where somebody wants it.
func (r *RPC) logCall(ctx context.Context, m *method, c call) {
	if !r.log.Enabled(ctx, slog.LevelDebug) {
		return
	}
	attrs := make([]slog.Attr, 0, 16)
	attrs = append(attrs,
		slog.String("service", m.service), slog.String("method", m.name),
		slog.String("code", c.code.String()), slog.Duration("duration", c.took))
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		attrs = append(attrs, slog.String("peer", p.Addr.String()))
	}
	attrs = append(append(attrs, Attrs(ctx)...), about(c.req)...)
	if md := RequestMetadata(ctx); md != nil {
		for _, f := range [...]struct{ key, value string }{
			{"tool", strings.TrimSpace(md.GetToolDetails().GetToolName() + " " + md.GetToolDetails().GetToolVersion())},
			{"correlated_invocations", md.GetCorrelatedInvocationsId()},
			{"target", md.GetTargetId()},
			{"mnemonic", md.GetActionMnemonic()},
		} {
			if f.value != "" {
				attrs = append(attrs, slog.String(f.key, f.value[:min(len(f.value), maxField)]))
			}
		}
	}
	if c.err != nil {
		attrs = append(attrs, slog.String("error", c.err.Error()))
	}
	r.log.LogAttrs(ctx, slog.LevelDebug, "rpc", attrs...)
}

// panicked records a panic and makes the error that the client gets, which
// shows nothing of the inside.
func (r *RPC) panicked(ctx context.Context, m *method, v any) error {
	r.panics.Inc()
	r.log.LogAttrs(ctx, slog.LevelError, "handler panicked", append(Attrs(ctx),
		slog.String("service", m.service), slog.String("method", m.name),
		slog.String("panic", fmt.Sprint(v)), slog.String("stack", string(debug.Stack())))...)
	return status.Errorf(codes.Internal, "internal error: the handler panicked; the server's log has the stack, of request %s", Request(ctx))
}
