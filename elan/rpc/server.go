package rpc

import (
	"context"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	_ "google.golang.org/grpc/encoding/gzip" // clients may compress, whichever program this is in
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/mettle-build/mettle/elan/gate"
	"github.com/mettle-build/mettle/elan/wire"
)

// MaxMessageBytes bounds a message in either direction: room for the batches
// that Capabilities advertise, and for an inlined ActionResult. Clients' own
// limit is 4 MiB unless they raise it, so nothing larger is ever sent.
const MaxMessageBytes = 16 << 20

const (
	// minPing is how often a client may ping. Clients ping every 20 to 30 s;
	// gRPC's default of 5 min answers them with GOAWAY too_many_pings.
	minPing = 10 * time.Second
	// maxStreams is how many calls a connection has at once; what is beyond waits at
	// the client, which is told. Bazel makes up to 10,000.
	maxStreams = 16_384
	// maxHeaderBytes bounds the metadata of a call: tokens of some KiB, and what
	// proxies add.
	maxHeaderBytes = 64 << 10
	// handshakeTimeout is for TLS, the preface of HTTP/2 and its settings.
	handshakeTimeout = 20 * time.Second

	// streamWindow and connWindow are the flow control windows. Fixed ones
	// cost less than gRPC's estimate, which sends a ping with most reads; these
	// let a stream of 1 MiB messages run without waiting for its window.
	streamWindow = 4 << 20
	connWindow   = 16 << 20
	// bufferBytes are gathered before a system call. With 32 KiB a stream takes a
	// tenth more CPU, and a small call a quarter; 512 KiB save nothing more.
	bufferBytes = 128 << 10
	// streamWorkers are goroutines that serve one stream after the other, and so
	// have a stack already; what is beyond them gets a goroutine of its own. A
	// Write of 1 KiB takes 40 µs of CPU in place of 47.
	streamWorkers = 16
)

// NewServer returns a gRPC server set up as clients of the REAPI need it, with
// the services of health and reflection. The options come on top. Stop the
// Health before the server, so that balancers look elsewhere first.
func NewServer(opts ...grpc.ServerOption) (*grpc.Server, *health.Server) {
	pool := wire.NewPool()
	s := grpc.NewServer(append([]grpc.ServerOption{
		grpc.ForceServerCodecV2(wire.NewCodec(pool)),
		// Frames are received into its buffers, which gRPC's own would clear first.
		experimental.BufferPool(pool),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: gate.Ping, Timeout: gate.PingTimeout}),
		grpc.MaxRecvMsgSize(MaxMessageBytes),
		grpc.MaxSendMsgSize(MaxMessageBytes),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.InitialWindowSize(streamWindow),
		grpc.InitialConnWindowSize(connWindow),
		grpc.ReadBufferSize(bufferBytes),
		grpc.WriteBufferSize(bufferBytes),
		grpc.NumStreamWorkers(streamWorkers),
		// What handlers use is closed after the server.
		grpc.WaitForHandlers(true),
	}, opts...)...)
	h := health.NewServer()
	healthpb.RegisterHealthServer(s, h)
	reflection.Register(s)
	return s, h
}

// Serve serves s on l until ctx is done. Then it tells health checkers, goes on for
// a while for those who have not heard, waits for drain, lets the calls that are still there end within grace, cuts off the
// rest and returns. It closes l. The error is that of a listener that failed.
func Serve(ctx context.Context, s *grpc.Server, o ServeOptions) error {
	failed := make(chan error, 1) // one value, so the goroutine never waits
	go func() { failed <- s.Serve(o.Listener) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve on %s: %w", o.Listener.Addr(), err)
	case <-ctx.Done():
	}
	if o.Health != nil {
		o.Health.Shutdown()
	}
	if o.Delay > 0 {
		select {
		case err := <-failed:
			return fmt.Errorf("serve on %s: %w", o.Listener.Addr(), err)
		case <-time.After(o.Delay):
		}
	}
	if o.Drain != nil {
		o.Drain()
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.GracefulStop()
	}()
	late := time.AfterFunc(o.Grace, s.Stop)
	defer late.Stop()
	<-stopped
	return <-failed // nil after a stop
}

// ServeOptions are what Serve needs beside the server.
type ServeOptions struct {
	Listener net.Listener
	// Health, if there is one, answers NOT_SERVING from the end of ctx on.
	Health *health.Server
	// Delay is how long all goes on as before, but for what Health answers: so long
	// balancers may take to send no more clients.
	Delay time.Duration
	// Drain, if there is one, returns when no work is left that a client waits
	// for, or when it may be cut off.
	Drain func()
	// Grace is how long calls may last after Drain.
	Grace time.Duration
}
