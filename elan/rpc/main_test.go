package rpc_test

import (
	"bytes"
	"context"
	"net"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/mem"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/elan/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is a server over a fake store, and the clients of its services.
type server struct {
	store        *fakeStore
	conn         *grpc.ClientConn
	capabilities repb.CapabilitiesClient
	cas          repb.ContentAddressableStorageClient
	actions      repb.ActionCacheClient
	streams      bytestream.ByteStreamClient
}

// start starts a server with options that need no Store and Actions. Its codec and
// its buffers are those of NewServer, but that buffers are overwritten.
func start(tb testing.TB, o rpc.Options, opts ...grpc.ServerOption) *server {
	tb.Helper()
	return startOn(tb, newFakeStore(), o, opts...)
}

// startOn is start with a fake that is there.
func startOn(tb testing.TB, fake *fakeStore, o rpc.Options, opts ...grpc.ServerOption) *server {
	tb.Helper()
	s := startOver(tb, fake, o, opts...)
	s.store = fake
	return s
}

// startOver starts a server over another store.
func startOver(tb testing.TB, store interface {
	blob.Store
	blob.Entries
}, o rpc.Options, opts ...grpc.ServerOption,
) *server {
	tb.Helper()
	actions, err := action.New(action.Options{Store: store, Stores: o.Stores, Entries: store})
	if err != nil {
		tb.Fatal(err)
	}
	o.Store, o.Actions = store, actions
	pool := poisonPool{}
	rpc.SetPool(&o, pool)
	g := grpc.NewServer(append([]grpc.ServerOption{
		grpc.ForceServerCodecV2(wire.NewCodec(pool)), experimental.BufferPool(pool),
	}, opts...)...)
	if err := rpc.Register(g, o); err != nil {
		tb.Fatal(err)
	}
	l := bufconn.Listen(1 << 20)
	return connect(tb, g, l, "passthrough:bufconn",
		grpc.WithInitialWindowSize(64<<10), // a fixed one: what is not read stays with the server
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
}

// connect serves g on l, and makes clients for it.
func connect(tb testing.TB, g *grpc.Server, l net.Listener, target string, opts ...grpc.DialOption) *server {
	tb.Helper()
	done := make(chan error)
	go func() { done <- g.Serve(l) }()
	s := &server{}
	var err error
	s.conn, err = grpc.NewClient(target, append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.conn.Close(); err != nil {
			tb.Error(err)
		}
		g.Stop()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	})
	s.capabilities = repb.NewCapabilitiesClient(s.conn)
	s.cas = repb.NewContentAddressableStorageClient(s.conn)
	s.actions = repb.NewActionCacheClient(s.conn)
	s.streams = bytestream.NewByteStreamClient(s.conn)
	return s
}

// wantCode fails the test unless err has the code.
func wantCode(tb testing.TB, what string, err error, want codes.Code) {
	tb.Helper()
	if got := gstatus.Code(err); got != want {
		tb.Errorf("%s: %v, want code %v", what, err, want)
	}
}

// pattern is n bytes of which no two parts are alike.
func pattern(n int) []byte {
	data := make([]byte, n)
	x := uint32(1)
	for i := range data {
		x = x*1664525 + 1013904223
		data[i] = byte(x >> 24)
	}
	return data
}

var _ blob.Store = (*fakeStore)(nil)

func of(data []byte) digest.Digest { return digest.Of(digest.SHA256, data) }

// poisonPool overwrites what it gives and what it gets back: who reads what he
// has not written, or goes on with what he gave up, has wrong bytes, or a race.
type poisonPool struct{ mem.NopBufferPool }

func (p poisonPool) Get(n int) *[]byte {
	b := make([]byte, n, max(n, 2<<10)) // gRPC counts no references to less
	copy(b, bytes.Repeat([]byte{0xdb}, n))
	return &b
}

func (p poisonPool) Put(b *[]byte) {
	all := (*b)[:cap(*b)]
	copy(all, bytes.Repeat([]byte{0xdb}, len(all)))
}
