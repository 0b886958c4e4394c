package relay

import (
	"context"
	"errors"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

type capabilitiesServer struct {
	repb.UnimplementedCapabilitiesServer
	r *Relay
}

// GetCapabilities tells what the storage offers the caller, and the execution
// that this server does.
func (s *capabilitiesServer) GetCapabilities(ctx context.Context, req *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
	out := s.r.outgoing(ctx)
	a := attempts{r: s.r, m: &method{}}
	for {
		conn, err := a.conn(ctx)
		if err != nil {
			return nil, err
		}
		var header, trailer metadata.MD
		c, err := repb.NewCapabilitiesClient(conn).GetCapabilities(out, req, grpc.Header(&header), grpc.Trailer(&trailer))
		if err != nil {
			if a.again(ctx, err, header != nil || trailer != nil) {
				continue
			}
			return nil, err //nolint:wrapcheck // a status, to be passed on as it is
		}
		return s.merge(c), nil
	}
}

// merge changes what the storage offers into what this server does.
func (s *capabilitiesServer) merge(c *repb.ServerCapabilities) *repb.ServerCapabilities {
	c.ExecutionCapabilities = s.r.o.Execution
	if cache := c.CacheCapabilities; cache != nil {
		// 0 is no limit of the storage's own.
		if n := cache.MaxBatchTotalSizeBytes; n <= 0 || n > s.r.o.MaxBatchBytes {
			cache.MaxBatchTotalSizeBytes = s.r.o.MaxBatchBytes
		}
	}
	return c
}

// Ready returns nil where a server of the storage answers now, and why not
// otherwise. It does not wait for one that is away.
func (r *Relay) Ready(ctx context.Context) error {
	conn := r.o.Conns[0]
	resp, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	switch {
	case status.Code(err) == codes.Unimplemented:
		return nil // it answers
	case err != nil:
		return fmt.Errorf("storage: %w", err)
	case resp.Status != healthpb.HealthCheckResponse_SERVING:
		return errors.New("storage: it says that it does not serve")
	}
	return nil
}
