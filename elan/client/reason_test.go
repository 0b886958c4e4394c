package client_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/mettle-build/mettle/creds/credstest"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
)

// TestDial_says_why: people mix up TLS and none, and are told in words.
func TestDial_says_why(t *testing.T) {
	ca := credstest.NewAuthority(t, "ours")
	pair, err := tls.LoadX509KeyPair(ca.Issue(t.TempDir(), "server", credstest.Server()))
	if err != nil {
		t.Fatal(err)
	}
	secure := credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12})
	strict := credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12, ClientAuth: tls.RequireAnyClientCert,
	})
	withTLS := grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12}))
	for name, tc := range map[string]struct {
		server []grpc.ServerOption
		client []grpc.DialOption
		want   string
	}{
		"no TLS to a port with it":               {[]grpc.ServerOption{grpc.Creds(secure)}, nil, "it speaks TLS there: put grpcs:// before the address"},
		"no TLS to a port that wants to know us": {[]grpc.ServerOption{grpc.Creds(strict)}, nil, "it speaks TLS there"},
		"TLS to a port without it":               {nil, []grpc.DialOption{withTLS}, "it speaks no TLS there: call it by grpc://"},
		"a certificate of nobody's":              {[]grpc.ServerOption{grpc.Creds(secure)}, []grpc.DialOption{withTLS}, "TLS does not come about"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			conn, err := client.Dial(ctx, listen(t, tc.server...), tc.client...)
			if err == nil {
				_ = conn.Close()
				t.Fatal("connected")
			}
			if !errors.Is(err, blob.ErrUnavailable) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q in it", err, tc.want)
			}
		})
	}
}

func TestSpeaksTLS(t *testing.T) {
	if client.SpeaksTLS(t.Context(), listen(t)) {
		t.Error("a port without TLS is said to have it")
	}
	if client.SpeaksTLS(t.Context(), "no port") {
		t.Error("no address is said to have TLS")
	}
}

// listen serves gRPC without a service until the test ends.
func listen(t *testing.T, opts ...grpc.ServerOption) (addr string) {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, served := grpc.NewServer(opts...), make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // which it was before it began
			t.Error(err)
		}
	})
	return l.Addr().String()
}
