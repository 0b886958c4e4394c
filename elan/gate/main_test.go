package gate_test

import (
	"context"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mettle-build/mettle/elan/gate"
	"github.com/mettle-build/mettle/elan/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The methods of the service.
const (
	unaryMethod  = "/test.Service/Unary"
	batchMethod  = "/test.Service/Batch"
	streamMethod = "/test.Service/Stream"
)

type (
	message = wrapperspb.BytesValue
	// handlers are what the service does; one that is nil is not called.
	handlers struct {
		unary, batch func(context.Context) error
		answer       int // bytes of their answers
		stream       func(grpc.ServerStream) error
	}
)

// desc is the service of h.
func (h handlers) desc() *grpc.ServiceDesc {
	method := func(name string, f func(context.Context) error) grpc.MethodDesc {
		return grpc.MethodDesc{MethodName: name, Handler: func(_ any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			if err := dec(&message{}); err != nil {
				return nil, err
			}
			return &message{Value: make([]byte, h.answer)}, f(ctx)
		}}
	}
	return &grpc.ServiceDesc{
		ServiceName: "test.Service",
		Methods:     []grpc.MethodDesc{method("Unary", h.unary), method("Batch", h.batch)},
		Streams: []grpc.StreamDesc{{StreamName: "Stream", ClientStreams: true, ServerStreams: true, Handler: func(_ any, ss grpc.ServerStream) error {
			return h.stream(ss)
		}}},
	}
}

// served is a gate, and a server behind it.
type served struct {
	gate *gate.Gate
	dial func(context.Context, string) (net.Conn, error)
}

// serve serves h behind a gate. Where l is nil, connections are in memory. It ends
// with the test.
func serve(t *testing.T, o gate.Options, h handlers, l net.Listener, weigh func() int64) *served {
	t.Helper()
	o.Prefix = "test"
	if o.Kinds == nil {
		gate.SetBatch(&o, batchMethod)
	}
	g, err := gate.New(o)
	if err != nil {
		t.Fatal(err)
	}
	if weigh != nil {
		g.SetWeigh(weigh)
	}
	s := &served{gate: g}
	if l == nil {
		b := bufconn.Listen(1 << 16)
		s.dial = func(ctx context.Context, _ string) (net.Conn, error) { return b.DialContext(ctx) }
		l = b
	}
	server := grpc.NewServer(append(g.ServerOptions(), grpc.WaitForHandlers(true), grpc.ForceServerCodecV2(wire.NewCodec(wire.NewPool())))...)
	g.Registrar(server).RegisterService(h.desc(), nil)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 2)
	go func() { ended <- server.Serve(g.Listener(l)) }()
	go func() { ended <- g.Run(ctx) }()
	t.Cleanup(func() {
		server.Stop()
		stop()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		if n := g.Calls(); n != 0 {
			t.Errorf("%d calls are going on after the end", n)
		}
	})
	return s
}

// connect connects to s; from, where it is not "", is the client's address.
func (s *served) connect(t *testing.T, target, from string) *grpc.ClientConn {
	t.Helper()
	dial := s.dial
	if dial == nil {
		dial = func(ctx context.Context, addr string) (net.Conn, error) {
			d := net.Dialer{}
			if from != "" {
				d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
			}
			return d.DialContext(ctx, "tcp", addr)
		}
	}
	conn, err := grpc.NewClient("passthrough:///"+target, grpc.WithContextDialer(dial), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithInitialWindowSize(64<<10), grpc.WithInitialConnWindowSize(64<<10), grpc.WithIdleTimeout(0))
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

// open begins a call of Stream.
func open(t *testing.T, conn *grpc.ClientConn) grpc.ClientStream {
	t.Helper()
	cs, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, streamMethod)
	if err != nil {
		t.Fatal(err)
	}
	return cs
}

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// wantLater wants a refusal by which a client can tell that it is not storage that is
// full, and when to come again.
func wantLater(t *testing.T, what string, err error) {
	t.Helper()
	wantCode(t, what, err, codes.ResourceExhausted)
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok && info.GetRetryDelay().AsDuration() > 0 {
			return
		}
	}
	t.Errorf("%s: %v does not say when to try again", what, err)
}

// deadline is far beyond what a step takes, also on a busy machine.
const deadline = time.Minute
