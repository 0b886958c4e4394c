package client

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// probeTimeout bounds a look at a port that does not answer as it should.
const probeTimeout = 3 * time.Second

// SpeaksTLS reports whether whoever listens at target, HOST:PORT, answers a TLS
// handshake, whatever its certificate is worth. It is for telling people why a
// connection without TLS does not come about; nothing is sent over it.
func SpeaksTLS(ctx context.Context, target string) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	// dns:///HOST:PORT is how gRPC names a host of several addresses.
	target = strings.TrimPrefix(target, "dns:///")
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", target)
	if err != nil {
		return false
	}
	defer raw.Close() //nolint:errcheck // nothing was written
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		return false
	}
	c := tls.Client(raw, &tls.Config{
		ServerName: host, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12,
		InsecureSkipVerify: true, //nolint:gosec // only whether there is TLS is asked
	})
	err = c.HandshakeContext(ctx)
	if err == nil {
		return true
	}
	// One that wants a certificate of its clients refuses in TLS's own words.
	refused, ok := errors.AsType[*net.OpError](err)
	return ok && refused.Op == "remote error"
}

// reason says in words why conn, which has failed to connect, did.
func reason(ctx context.Context, conn *grpc.ClientConn, target string) string {
	ctx, cancel := context.WithTimeout(ctx, 2*probeTimeout)
	defer cancel()
	// While it does not connect a call fails at once, with what the last attempt
	// came to.
	_, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	said := status.Convert(err).Message()
	switch {
	case err == nil:
		return "it was away for a moment"
	case strings.Contains(said, "does not look like a TLS handshake"):
		return "it speaks no TLS there: call it by grpc://, or without a scheme"
	case strings.Contains(said, "tls: "), strings.Contains(said, "x509: "):
		return "TLS does not come about: " + said
	case SpeaksTLS(ctx, target):
		return "it speaks TLS there: put grpcs:// before the address"
	}
	return said
}
