package relay

import (
	"context"
	"maps"
	"strings"

	"google.golang.org/grpc/metadata"

	"github.com/mettle-build/mettle/elan/wire"
)

// outgoing is the context of a call to the storage, with what the client sent
// along: RequestMetadata, credentials, traces.
func (r *Relay) outgoing(ctx context.Context) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	md = passed(md)
	if !r.o.PassCredentials {
		maps.DeleteFunc(md, func(k string, _ []string) bool { return !harmless(k) })
	}
	if r.o.Caller != nil {
		if name := r.o.Caller(ctx); name != "" {
			if md == nil {
				md = metadata.MD{}
			}
			md.Set(wire.ActsForHeader, name)
		}
	}
	return metadata.NewOutgoingContext(ctx, md)
}

// harmless reports whether metadata of a client may go on in a call that is made in the
// name of this server, or where others can read it: it gives nobody rights, at whatever
// storage and whatever is in front of it.
func harmless(key string) bool {
	switch key {
	case "traceparent", "tracestate":
		return true
	}
	return strings.HasPrefix(key, "build.bazel.")
}

// passed is md without what belongs to a connection or to gRPC itself, which
// each side makes anew, and without what only a server may say. The values are those
// of md.
func passed(md metadata.MD) metadata.MD {
	var kept metadata.MD
	for k, vs := range md {
		switch {
		case strings.HasPrefix(k, ":"), strings.HasPrefix(k, "grpc-"):
		case k == "content-type", k == "user-agent", k == "te", k == "host", k == "connection", k == wire.ActsForHeader:
		default:
			if kept == nil {
				kept = make(metadata.MD, len(md))
			}
			kept[k] = vs
		}
	}
	return kept
}
