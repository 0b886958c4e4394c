package relay_test

import (
	"errors"
	"net"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/logstream"
	"github.com/mettle-build/mettle/elan/relay"
	"github.com/mettle-build/mettle/elan/rpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// backend is a server that comes and goes at one address.
type backend struct {
	addr     string
	register func(*grpc.Server)
	server   *grpc.Server
	health   *health.Server
	done     chan error
}

// newBackend makes a backend that does not serve yet.
func newBackend(t testing.TB, register func(*grpc.Server)) *backend {
	t.Helper()
	b := &backend{addr: "127.0.0.1:0", register: register}
	b.start(t) // finds the port
	b.kill(t)
	t.Cleanup(func() { b.kill(t) })
	return b
}

// started is newBackend and start.
func started(t testing.TB, register func(*grpc.Server)) *backend {
	t.Helper()
	b := newBackend(t, register)
	b.start(t)
	return b
}

// start serves, at the address of before.
func (b *backend) start(t testing.TB) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	b.addr = l.Addr().String()
	b.server, b.health = rpc.NewServer()
	b.register(b.server)
	b.done = make(chan error, 1)
	go func(s *grpc.Server, done chan<- error) { done <- s.Serve(l) }(b.server, b.done)
}

// kill ends the server and all its connections.
func (b *backend) kill(t testing.TB) {
	t.Helper()
	if b.server == nil {
		return
	}
	b.server.Stop()
	// One that was stopped before it began says so.
	if err := <-b.done; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		t.Error(err)
	}
	b.server = nil
}

// elan registers a whole storage server over a store that all of them share.
func elan(t testing.TB) func(*grpc.Server) { return elanWith(t, nil) }

// elanWith is elan with log streams.
func elanWith(t testing.TB, logs *logstream.Streams) func(*grpc.Server) {
	t.Helper()
	store, err := mem.New(mem.Options{MaxBytes: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	actions, err := action.New(action.Options{Store: store, Entries: store})
	if err != nil {
		t.Fatal(err)
	}
	return func(s *grpc.Server) {
		if err := rpc.Register(s, rpc.Options{Store: store, Actions: actions, LogStreams: logs}); err != nil {
			t.Error(err)
		}
	}
}

// side is a relay and the clients of it.
type side struct {
	relay   *relay.Relay
	conn    *grpc.ClientConn
	cas     repb.ContentAddressableStorageClient
	streams bytestream.ByteStreamClient
}

// relayTo serves a relay to the backends.
func relayTo(t testing.TB, o relay.Options, backends ...*backend) *side {
	t.Helper()
	var targets []string
	for _, b := range backends {
		targets = append(targets, b.addr)
	}
	if o.Conns == nil {
		o.Conns = []*grpc.ClientConn{connect(t, targets, relay.DialOptions()...)}
	}
	r, err := relay.New(o)
	if err != nil {
		t.Fatal(err)
	}
	b := started(t, func(s *grpc.Server) { r.Register(s) })
	conn := connect(t, []string{b.addr})
	return &side{relay: r, conn: conn, cas: repb.NewContentAddressableStorageClient(conn), streams: bytestream.NewByteStreamClient(conn)}
}

func connect(t testing.TB, targets []string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := client.Connect(targets, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
	return conn
}
