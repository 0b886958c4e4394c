package main

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/creds/credstest"
	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/elan/wire"
	"github.com/mettle-build/mettle/metrics"
)

// named are the resource names that a server was asked for.
type named struct {
	mu    sync.Mutex
	names []string
}

func (n *named) add(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if name != "" && !slices.Contains(n.names, name) {
		n.names = append(n.names, name)
	}
}

// take returns and forgets them.
func (n *named) take() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	names := n.names
	n.names = nil
	return names
}

// listening is a stream that tells the names in its messages.
type listening struct {
	grpc.ServerStream
	heard *named
}

func (l listening) RecvMsg(m any) error {
	err := l.ServerStream.RecvMsg(m)
	switch m := m.(type) {
	case *wire.WriteRequest:
		l.heard.add(m.ResourceName)
	case *bytestream.ReadRequest:
		l.heard.add(m.ResourceName)
	}
	return err
}

// startStorage serves a storage, and returns its address.
func startStorage(t *testing.T) (addr string, heard *named) {
	t.Helper()
	store, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	actions, err := action.New(action.Options{Store: store, Entries: store})
	if err != nil {
		t.Fatal(err)
	}
	heard = &named{}
	server, _ := rpc.NewServer(grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		return handler(srv, listening{ss, heard})
	}))
	if err := rpc.Register(server, rpc.Options{Store: store, Actions: actions}); err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String(), heard
}

// --compress_from is how inputs and outputs travel, both ways, from that size on.
func TestStorage_compressed(t *testing.T) {
	data := bytes.Repeat([]byte("what comes again "), 400_000) // too large for a batch
	for name, tc := range map[string]struct {
		from int64
		want string // in the resource names
	}{"not by default": {0, "/blobs/"}, "large enough": {1 << 20, "/compressed-blobs/zstd/"}, "too small": {1 << 30, "/blobs/"}} {
		t.Run(name, func(t *testing.T) {
			addr, heard := startStorage(t)
			f := storageFlags{Storage: addr, compressFrom: tc.from}
			if err := f.check(); err != nil {
				t.Fatal(err)
			}
			open := func(dir string) blob.Store {
				s, err := f.open(slog.New(slog.DiscardHandler), metrics.NewRegistry())
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { s.close() }) //nolint:errcheck // it is a connection
				cached, err := s.withCache(t.Context(), cacheOptions{
					dir: filepath.Join(t.TempDir(), dir), minFree: -1, log: slog.New(slog.DiscardHandler), registry: metrics.NewRegistry(),
				})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := cached.close(); err != nil {
						t.Error(err)
					}
				})
				return cached.of("i")
			}
			d := digest.Of(digest.SHA256, data)
			if err := blob.WriteBytes(t.Context(), open("one"), d, data); err != nil {
				t.Fatal(err)
			}
			check := func(what string) {
				t.Helper()
				names := heard.take()
				if len(names) != 1 || !strings.Contains(names[0], tc.want) {
					t.Errorf("%s as %q, want one with %s", what, names, tc.want)
				}
			}
			check("written")
			r, err := open("another").Open(t.Context(), d, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
				t.Errorf("read %d bytes, %v", len(got), err)
			}
			check("read")
		})
	}
}

// TestPassCredentials: an API server passes on what clients show of themselves where it
// shows nothing of its own, and nobody listens. One that has a certificate calls in its
// own name, as one with a token: the storage would ask the client's token before it.
func TestPassCredentials(t *testing.T) {
	t.Setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
	dir := t.TempDir()
	authority := credstest.NewAuthority(t, "ours")
	cert, key := authority.Issue(dir, "api", credstest.Client("api"))
	ca := "--storage_tls_ca=" + credstest.Write(t, dir, "ca.pem", authority.PEM)
	token := credstest.Write(t, dir, "token", apiToken)
	for name, tc := range map[string]struct {
		args []string
		want bool
	}{
		"on this machine":    {[]string{"--storage=localhost:1"}, true},
		"over TLS":           {[]string{"--storage=grpcs://elan.example:1", ca}, true},
		"without":            {[]string{"--storage=elan.example:1"}, false},
		"with a token":       {[]string{"--storage=localhost:1", "--storage_token_file=" + token}, false},
		"with a certificate": {[]string{"--storage=grpcs://elan.example:1", ca, "--storage_tls_client_cert=" + cert, "--storage_tls_client_key=" + key}, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := parsed(t, append([]string{"api", "--http_port=-1", "--pools=default/1", "--queue=gcppubsub://project/x"}, tc.args...)...)
			if got := c.API.passCredentials(); got != tc.want {
				t.Errorf("clients' credentials are passed on: %v, want %v", got, tc.want)
			}
		})
	}
}
