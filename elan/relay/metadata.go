package relay

import (
	"context"
	"strings"

	"google.golang.org/grpc/metadata"
)

// outgoing is the context of a call to the storage, with what the client sent
// along: RequestMetadata, credentials, traces.
func (r *Relay) outgoing(ctx context.Context) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	md = passed(md)
	if !r.o.PassCredentials {
		md.Delete("authorization")
	}
	return metadata.NewOutgoingContext(ctx, md)
}

// passed is md without what belongs to a connection or to gRPC itself, which
// each side makes anew. The values are those of md.
func passed(md metadata.MD) metadata.MD {
	var kept metadata.MD
	for k, vs := range md {
		switch {
		case strings.HasPrefix(k, ":"), strings.HasPrefix(k, "grpc-"):
		case k == "content-type", k == "user-agent", k == "te", k == "host", k == "connection":
		default:
			if kept == nil {
				kept = make(metadata.MD, len(md))
			}
			kept[k] = vs
		}
	}
	return kept
}
