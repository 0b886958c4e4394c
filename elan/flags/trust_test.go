package flags_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/elan/wire"
)

// callers is a server that takes down what it would tell the next of who calls.
type callers struct {
	repb.UnimplementedCapabilitiesServer
	guard *flags.Guarded
	text  chan string
}

func (c *callers) GetCapabilities(ctx context.Context, _ *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
	c.text <- c.guard.CallerText(ctx)
	return &repb.ServerCapabilities{}, nil
}

// TestGuarded_CallerText: what one server tells the next of who calls is never more than
// that takes, who would refuse the call for it.
func TestGuarded_CallerText(t *testing.T) {
	dir := t.TempDir()
	credstest.Write(t, dir, "token", "api-0123456789abcdef")
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	trust := flags.Trust{Policy: credstest.Write(t, dir, "policy.yaml", "identities: [{name: front, token_file: token, rights: [cas:read], acts_for: true}]")}
	g, err := trust.Guard(flags.GuardOptions{Addr: l.Addr()})
	if err != nil {
		t.Fatal(err)
	}
	c := &callers{guard: g, text: make(chan string, 1)}
	srv := grpc.NewServer(g.ServerOptions...)
	repb.RegisterCapabilitiesServer(srv, c)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	defer func() {
		srv.Stop()
		<-served //nolint:errcheck // it was stopped
	}()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	long := strings.Repeat("x", creds.MaxForBytes)
	for who, want := range map[string]string{"": "front", "ci": "ci via front", long: long} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer api-0123456789abcdef")
		if who != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, wire.ActsForHeader, who)
		}
		if _, err := repb.NewCapabilitiesClient(conn).GetCapabilities(ctx, &repb.GetCapabilitiesRequest{}); err != nil {
			t.Fatal(err)
		}
		if got := <-c.text; got != want {
			t.Errorf("for %.10q: %.40q of %d bytes, want %.40q", who, got, len(got), want)
		}
	}
}

// A server that anybody may use says so, and no other does.
func TestTrust_Guard_open(t *testing.T) {
	tcp := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 7778} }
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(policy, []byte("anonymous: {rights: [\"cas:read\"]}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		trust flags.Trust
		addr  net.Addr
		want  bool
	}{
		"loopback":      {addr: tcp("127.0.0.1")},
		"all addresses": {addr: tcp("::"), want: true},
		"one address":   {addr: tcp("192.168.1.1"), want: true},
		"a policy":      {addr: tcp("::"), trust: flags.Trust{Policy: policy}},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			g, err := tc.trust.Guard(flags.GuardOptions{Addr: tc.addr, Logger: slog.New(slog.NewTextHandler(&log, nil))})
			if err != nil {
				t.Fatal(err)
			}
			if err := g.Close(); err != nil {
				t.Error(err)
			}
			if got := strings.Contains(log.String(), "whoever reaches this server"); got != tc.want {
				t.Errorf("warned: %v, want %v: %s", got, tc.want, log.String())
			}
		})
	}
}

// TestReachable: what a server prints is what a client can call.
func TestReachable(t *testing.T) {
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "localhost"
	}
	tcp := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 7778} }
	for name, tc := range map[string]struct {
		addr net.Addr
		want string
	}{
		"loopback":              {tcp("127.0.0.1"), "127.0.0.1:7778"},
		"loopback of IPv6":      {tcp("::1"), "[::1]:7778"},
		"one address":           {tcp("192.168.1.1"), "192.168.1.1:7778"},
		"all addresses":         {tcp("0.0.0.0"), net.JoinHostPort(host, "7778")},
		"all addresses of IPv6": {tcp("::"), net.JoinHostPort(host, "7778")},
		"none":                  {&net.TCPAddr{Port: 7778}, net.JoinHostPort(host, "7778")},
		"no TCP":                {&net.UnixAddr{Name: "/x"}, "/x"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := flags.Reachable(tc.addr); got != tc.want {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
	if got, want := (flags.Trust{TLSCert: "c", TLSKey: "k"}).Address(tcp("::")), "grpcs://"+net.JoinHostPort(host, "7778"); got != want {
		t.Errorf("with TLS %q, want %q", got, want)
	}
}
