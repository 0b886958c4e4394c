package tracing

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"math"
	"math/rand/v2"
	"strings"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	// maxMetadata bounds a RequestMetadata that is looked at: it has seven short
	// strings.
	maxMetadata = 8 << 10
	// maxParent and maxState bound the W3C headers. Those of today have 55 bytes, and
	// up to 512.
	maxParent, maxState = 128, 512
	// fieldInvocation is RequestMetadata.tool_invocation_id.
	fieldInvocation = 3
)

// share is a part of all traces, from 0 to 1.
type share float64

// takes reports whether a trace is in the share, by its id alone. In the ids of
// invocations some bits are the same for all, and so all are mixed.
func (s share) takes(id trace.TraceID) bool {
	switch {
	case s >= 1:
		return true
	case s <= 0:
		return false
	}
	x := binary.BigEndian.Uint64(id[:8]) ^ binary.BigEndian.Uint64(id[8:])*0x9e3779b97f4a7c15
	// The end of MurmurHash3.
	x = (x ^ x>>33) * 0xff51afd7ed558ccd
	x = (x ^ x>>33) * 0xc4ceb9fe1a85ec53
	x ^= x >> 33
	return float64(x>>11) < float64(s)*(1<<53)
}

// origin is where a call or a job belongs.
type origin struct {
	parent   trace.SpanContext // valid where the caller sent one
	id       trace.TraceID     // of the trace
	recorded bool
}

// headers are those of a call by name, "" for one that is absent.
type headers func(name string) string

// originOf finds the trace of what came with headers and RequestMetadata.
func (t *Tracer) originOf(h headers, requestMetadata string) origin {
	if parent := parentOf(h); parent.IsValid() {
		return origin{parent: parent, id: parent.TraceID(), recorded: parent.IsSampled()}
	}
	id := traceOf(requestMetadata)
	return origin{id: id, recorded: t.share.takes(id)}
}

// parentOf reads the W3C headers. What is malformed or too long is not there.
func parentOf(h headers) trace.SpanContext {
	parent := h("traceparent")
	if parent == "" || len(parent) > maxParent {
		return trace.SpanContext{}
	}
	c := propagation.MapCarrier{"traceparent": parent}
	if state := h("tracestate"); state != "" && len(state) <= maxState {
		c["tracestate"] = state
	}
	return trace.SpanContextFromContext(propagation.TraceContext{}.Extract(context.Background(), c))
}

// traceOf is the id of the trace of an invocation, and a new one for calls of none.
func traceOf(requestMetadata string) trace.TraceID {
	invocation := invocationOf(requestMetadata)
	if invocation == "" {
		return newTrace()
	}
	if id, ok := parseUUID(invocation); ok {
		return id
	}
	hash := sha256.Sum256([]byte(invocation))
	return trace.TraceID(hash[:16])
}

// invocationOf is the tool_invocation_id, read without the rest of the message.
func invocationOf(requestMetadata string) string {
	if len(requestMetadata) > maxMetadata {
		return ""
	}
	found := ""
	for b := []byte(requestMetadata); len(b) > 0; {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return ""
		}
		b = b[n:]
		if field == fieldInvocation && kind == protowire.BytesType {
			v, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return ""
			}
			found, b = string(v), b[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(field, kind, b); n < 0 {
			return ""
		}
		b = b[n:]
	}
	return found
}

// parseUUID reads 32 hexadecimal digits, with or without the dashes of a UUID.
func parseUUID(s string) (id trace.TraceID, ok bool) {
	if len(s) == 36 && s[8] == '-' && s[13] == '-' && s[18] == '-' && s[23] == '-' {
		s = strings.ReplaceAll(s, "-", "")
	}
	if len(s) != hex.EncodedLen(len(id)) {
		return id, false
	}
	_, err := hex.Decode(id[:], []byte(s))
	return id, err == nil && id.IsValid()
}

func newTrace() (id trace.TraceID) {
	binary.BigEndian.PutUint64(id[:8], rand.Uint64())
	binary.BigEndian.PutUint64(id[8:], 1+rand.Uint64N(math.MaxUint64)) // never all zero
	return id
}

func newSpan() (id trace.SpanID) {
	binary.BigEndian.PutUint64(id[:], 1+rand.Uint64N(math.MaxUint64))
	return id
}

// traceKey is of the id of the trace that a root begins.
type traceKey struct{}

// ids gives a root the trace that its context names.
type ids struct{}

// NewIDs implements sdk.IDGenerator.
func (ids) NewIDs(ctx context.Context) (trace.TraceID, trace.SpanID) {
	id, ok := ctx.Value(traceKey{}).(trace.TraceID)
	if !ok {
		id = newTrace()
	}
	return id, newSpan()
}

// NewSpanID implements sdk.IDGenerator.
func (ids) NewSpanID(context.Context, trace.TraceID) trace.SpanID { return newSpan() }

// start begins the first span of a call or a job here; it is nil where it is not
// recorded, and the context only has what is to be passed on.
func (t *Tracer) start(ctx context.Context, o origin, name string, kind trace.SpanKind) (context.Context, trace.Span) {
	switch {
	case !o.recorded && o.parent.IsValid():
		return trace.ContextWithRemoteSpanContext(ctx, o.parent), nil
	case !o.recorded:
		// So that whoever is called decides alike.
		return trace.ContextWithSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{TraceID: o.id, SpanID: newSpan()})), nil
	case o.parent.IsValid():
		ctx = trace.ContextWithRemoteSpanContext(ctx, o.parent)
	default:
		ctx = context.WithValue(ctx, traceKey{}, o.id)
	}
	return t.tracer.Start(ctx, name, trace.WithSpanKind(kind))
}
