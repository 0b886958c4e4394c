package creds_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/elan/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// service answers all calls that the guard lets pass, and says who made them.
type service struct {
	repb.UnimplementedCapabilitiesServer
	repb.UnimplementedContentAddressableStorageServer
	repb.UnimplementedActionCacheServer
	repb.UnimplementedExecutionServer
	bytestream.UnimplementedByteStreamServer
	caps *repb.ServerCapabilities
	hold chan struct{} // GetActionResult waits for it, where it is there
	in   chan struct{}
	// behind counts the calls with what a guard keeps from handlers.
	behind atomic.Int32
}

func (s *service) GetCapabilities(context.Context, *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
	return s.caps, nil
}

func (s *service) FindMissingBlobs(context.Context, *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
	return &repb.FindMissingBlobsResponse{}, nil
}

func (s *service) BatchUpdateBlobs(context.Context, *repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error) {
	return &repb.BatchUpdateBlobsResponse{}, nil
}

// GetActionResult's result names the caller.
func (s *service) GetActionResult(ctx context.Context, _ *repb.GetActionResultRequest) (*repb.ActionResult, error) {
	if s.hold != nil {
		s.in <- struct{}{}
		<-s.hold
	}
	name := ""
	if id := creds.From(ctx); id != nil {
		if name = id.Name; id.For != "" {
			name += " for " + id.For
		}
	}
	if len(metadata.ValueFromIncomingContext(ctx, wire.ActsForHeader)) > 0 {
		s.behind.Add(1)
	}
	return &repb.ActionResult{StdoutRaw: []byte(name)}, nil
}

func (s *service) UpdateActionResult(_ context.Context, r *repb.UpdateActionResultRequest) (*repb.ActionResult, error) {
	return r.ActionResult, nil
}

// Write hides the errors of its stream, as a careless handler would.
func (s *service) Write(stream bytestream.ByteStream_WriteServer) error {
	n := int64(0)
	for {
		r, err := stream.Recv()
		if err != nil {
			break
		}
		n += int64(len(r.Data))
	}
	return stream.SendAndClose(&bytestream.WriteResponse{CommittedSize: n})
}

// site is a server with a guard.
type site struct {
	addr string
}

// serve starts a server, over TLS where there are files for it.
func serve(t *testing.T, o creds.Options, tls creds.ServerTLS, s *service) *site {
	t.Helper()
	g, err := creds.New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := g.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	opts := g.ServerOptions()
	c, err := tls.Credentials()
	if err != nil {
		t.Fatal(err)
	}
	if c != nil {
		opts = append(opts, grpc.Creds(c))
	}
	srv, _ := rpc.NewServer(opts...)
	repb.RegisterCapabilitiesServer(srv, s)
	repb.RegisterContentAddressableStorageServer(srv, s)
	repb.RegisterActionCacheServer(srv, s)
	repb.RegisterExecutionServer(srv, s)
	bytestream.RegisterByteStreamServer(srv, s)
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop()
		<-served //nolint:errcheck // it was stopped
		cancel()
		<-ended
	})
	return &site{addr: l.Addr().String()}
}

// caller is a client of a site.
type caller struct {
	caps    repb.CapabilitiesClient
	cas     repb.ContentAddressableStorageClient
	ac      repb.ActionCacheClient
	exec    repb.ExecutionClient
	streams bytestream.ByteStreamClient
	health  healthpb.HealthClient
}

func (s *site) dial(t *testing.T, c creds.Client) *caller {
	t.Helper()
	opts, err := c.DialOptions()
	if err != nil {
		t.Fatal(err)
	}
	return s.dialWith(t, opts...)
}

func (s *site) dialWith(t *testing.T, opts ...grpc.DialOption) *caller {
	t.Helper()
	conn, err := grpc.NewClient(s.addr, append([]grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &caller{
		repb.NewCapabilitiesClient(conn), repb.NewContentAddressableStorageClient(conn), repb.NewActionCacheClient(conn),
		repb.NewExecutionClient(conn), bytestream.NewByteStreamClient(conn), healthpb.NewHealthClient(conn),
	}
}

// header is a token as a client sends it that has no such package.
type header string

func (h header) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": string(h)}, nil
}
func (header) RequireTransportSecurity() bool { return false }

var _ credentials.PerRPCCredentials = header("")
