package relay

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/mettle-build/mettle/elan/wire"
)

// unary passes on a call of one message each way. The caller frees req.
func (r *Relay) unary(ctx context.Context, m *method, req *wire.Raw) (*wire.Raw, error) {
	out := r.outgoing(ctx)
	a := attempts{r: r, m: m}
	for {
		conn, err := a.conn(ctx)
		if err != nil {
			return nil, err
		}
		var header, trailer metadata.MD
		once, reply := req.Clone(), &wire.Raw{}
		err = conn.Invoke(out, m.full, once, reply, r.codec, grpc.Header(&header), grpc.Trailer(&trailer))
		once.Free()
		if err != nil {
			reply.Free()
			if a.elsewhere(ctx, err, trailer) || a.again(ctx, err, header != nil || trailer != nil) {
				continue
			}
		}
		// Both fail only where the answer is on its way already.
		if md := passed(header); len(md) > 0 {
			_ = grpc.SetHeader(ctx, md)
		}
		if md := passed(trailer); len(md) > 0 {
			_ = grpc.SetTrailer(ctx, md)
		}
		if err != nil {
			return nil, err //nolint:wrapcheck // a status, to be passed on as it is
		}
		return reply, nil
	}
}
