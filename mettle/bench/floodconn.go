package bench

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
)

// Floods of connections.

// halfPreface is what a client of HTTP/2 says first, but not all of it.
const halfPreface = "PRI * HTTP/2.0\r\n"

// holdConnections has each op make a connection of its own and keep it, with one
// call now and then.
func holdConnections(_ context.Context, o Options, like *client) (op, func(), error) {
	target, opts, err := dialOptions(o)
	if err != nil {
		return nil, nil, err
	}
	return func(ctx context.Context, _ uint64) error {
		conn, err := grpc.NewClient(target, opts...)
		if err != nil {
			return err
		}
		defer conn.Close() //nolint:errcheck // changes no figure
		for ctx.Err() == nil {
			if _, err := repb.NewCapabilitiesClient(conn).GetCapabilities(ctx, &repb.GetCapabilitiesRequest{InstanceName: like.instance}); err != nil {
				return err
			}
			pause(ctx, 20*floodPause)
		}
		return nil
	}, func() {}, nil
}

// holdIdle has each op make a connection, with all handshakes, and keep it without
// a call. It ends when the server closes it.
func holdIdle(_ context.Context, o Options, _ *client) (op, func(), error) {
	target, opts, err := dialOptions(o)
	if err != nil {
		return nil, nil, err
	}
	opts = append(opts, grpc.WithIdleTimeout(0))
	return func(ctx context.Context, _ uint64) error {
		conn, err := grpc.NewClient(target, opts...)
		if err != nil {
			return err
		}
		defer conn.Close() //nolint:errcheck // changes no figure
		conn.Connect()
		for ready := false; ; {
			state := conn.GetState()
			if ready && state != connectivity.Ready || state == connectivity.TransientFailure {
				return fmt.Errorf("a connection became %v", state)
			}
			ready = state == connectivity.Ready
			if !conn.WaitForStateChange(ctx, state) {
				return nil
			}
		}
	}, func() {}, nil
}

// rawFlood is a flood of connections on which speak says something, and that then
// wait until the server closes them. An op succeeds when it does.
func rawFlood(onlyTLS bool, speak func(ctx context.Context, raw net.Conn, tlsConfig *tls.Config) (net.Conn, error)) func(context.Context, Options, *client) (op, func(), error) {
	return func(_ context.Context, o Options, _ *client) (op, func(), error) {
		scheme, addr, ok := strings.Cut(o.Remote, "://")
		switch {
		case !ok:
			addr = o.Remote
		case scheme == "unix" || scheme == "dns":
			return nil, nil, fmt.Errorf("%w: %s is no host and port", errSkip, o.Remote)
		}
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, nil, fmt.Errorf("remote %s: %w", o.Remote, err)
		}
		var tlsConfig *tls.Config
		if scheme == "grpcs" {
			tlsConfig = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host, NextProtos: []string{"h2"}}
		} else if onlyTLS {
			return nil, nil, fmt.Errorf("%w: %s is not spoken to over TLS", errSkip, o.Remote)
		}
		var dialer net.Dialer
		return func(ctx context.Context, _ uint64) error {
			raw, err := dialer.DialContext(ctx, "tcp", addr)
			if err != nil {
				return err
			}
			defer raw.Close() //nolint:errcheck // changes no figure
			stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
			defer stop()
			conn, err := speak(ctx, raw, tlsConfig)
			if err != nil {
				return err
			}
			return untilClosed(conn)
		}, func() {}, nil
	}
}

// untilClosed reads until the server closes the connection, one way or another.
func untilClosed(conn net.Conn) error {
	_, err := io.Copy(io.Discard, conn)
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// saysNothing is for connections without a word: where the server speaks TLS, its
// handshake is not begun.
func saysNothing(_ context.Context, raw net.Conn, _ *tls.Config) (net.Conn, error) { return raw, nil }

// stopsInTLS says the first words of TLS, and leaves the server's answer without one.
func stopsInTLS(ctx context.Context, raw net.Conn, c *tls.Config) (net.Conn, error) {
	if err := tls.Client(deaf{raw}, c).HandshakeContext(context.WithoutCancel(ctx)); !errors.Is(err, errDeaf) {
		return nil, fmt.Errorf("the first words of TLS: %w", err)
	}
	return raw, nil
}

// stopsInPreface stops in the middle of what a client of HTTP/2 says first.
func stopsInPreface(ctx context.Context, raw net.Conn, c *tls.Config) (net.Conn, error) {
	conn := raw
	if c != nil {
		spoken := tls.Client(raw, c)
		if err := spoken.HandshakeContext(ctx); err != nil {
			return nil, fmt.Errorf("TLS: %w", err)
		}
		conn = spoken
	}
	_, err := io.WriteString(conn, halfPreface)
	return conn, err
}

// deaf is a connection of which nothing is read.
type deaf struct{ net.Conn }

var errDeaf = errors.New("nothing is read")

// Read implements net.Conn.
func (deaf) Read([]byte) (int, error) { return 0, errDeaf }
