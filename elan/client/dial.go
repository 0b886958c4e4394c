package client

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/mettle-build/mettle/elan/blob"
)

const (
	// maxMessageBytes is what this side takes: a server may send whole batches.
	maxMessageBytes = 16 << 20
	// ioBufferBytes make for fewer system calls than gRPC's 32 KiB.
	ioBufferBytes = 128 << 10
	// streamWindow and connWindow let a stream of 1 MiB messages run without
	// waiting for its window. That they are fixed spares the pings by which gRPC
	// would find them.
	streamWindow = 4 << 20
	connWindow   = 16 << 20
	// keepaliveEvery is as often as servers must let clients ping, and rather
	// more often than routers forget connections.
	keepaliveEvery   = 30 * time.Second
	keepaliveTimeout = 20 * time.Second
)

// Dial connects to target, as in localhost:7777 or dns:///elan:7777, without TLS
// unless one of opts brings credentials, and returns when the connection is
// ready. Where the server can't be reached, or ctx ends before it was, the error
// wraps blob.ErrUnavailable. A connection that breaks later is made anew by
// itself. The caller closes it.
func Dial(ctx context.Context, target string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	opts = append(dialOptions(), opts...)
	conn, err := grpc.NewClient(target, opts...)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", target, err)
	}
	conn.Connect()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		if state == connectivity.TransientFailure {
			why := reason(ctx, conn, target)
			_ = conn.Close()
			return nil, fmt.Errorf("dial %s: %w: no gRPC server answers there: %s", target, blob.ErrUnavailable, why)
		}
		if !conn.WaitForStateChange(ctx, state) {
			_ = conn.Close()
			return nil, fmt.Errorf("dial %s: %w: %w", target, blob.ErrUnavailable, ctx.Err())
		}
	}
	return conn, nil
}

// dialOptions are those of all connections.
func dialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveEvery, Timeout: keepaliveTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)),
		grpc.WithReadBufferSize(ioBufferBytes),
		grpc.WithWriteBufferSize(ioBufferBytes),
		grpc.WithInitialWindowSize(streamWindow),
		grpc.WithInitialConnWindowSize(connWindow),
	}
}
