package relay_test

import (
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	assetpb "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/relay"
	"github.com/mettle-build/mettle/elan/rpc"
)

// aside is a storage that says when its first call has begun, and does not answer
// it until it is killed; the calls that follow it answers.
type aside struct {
	*fake
	begun chan struct{}
	calls atomic.Int32
}

func newAside() *aside {
	a := &aside{fake: &fake{}, begun: make(chan struct{}, 8)}
	hold := func(ctx context.Context) error {
		a.begun <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	a.find = func(ctx context.Context, _ *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
		if a.calls.Add(1) == 1 {
			return nil, hold(ctx)
		}
		return &repb.FindMissingBlobsResponse{}, nil
	}
	a.read = func(r *bytestream.ReadRequest, s bytestream.ByteStream_ReadServer) error {
		for range r.ReadLimit {
			if err := s.Send(&bytestream.ReadResponse{Data: []byte("x")}); err != nil {
				return err
			}
		}
		if a.calls.Add(1) == 1 {
			return hold(s.Context())
		}
		return s.Send(&bytestream.ReadResponse{Data: []byte("y")})
	}
	a.write = func(s bytestream.ByteStream_WriteServer) error {
		first := a.calls.Add(1) == 1
		var got []byte
		for {
			r, err := s.Recv()
			if errors.Is(err, io.EOF) {
				return s.SendAndClose(&bytestream.WriteResponse{CommittedSize: int64(len(got))})
			}
			if err != nil {
				return err
			}
			if int64(len(got)) != r.WriteOffset {
				return gstatus.Errorf(codes.InvalidArgument, "offset %d after %d bytes", r.WriteOffset, len(got))
			}
			got = append(got, r.Data...)
			if first && r.WriteOffset > 0 {
				return hold(s.Context())
			}
		}
	}
	return a
}

// steps are what a call does to the storage in the middle of it.
type steps struct{ kill, restart func() }

// TestRelay_killedInACall: what becomes of a call whose storage dies in the middle
// of it and comes back at the same address.
func TestRelay_killedInACall(t *testing.T) {
	read := func(n int64) func(ctx context.Context, s *side, do steps) error {
		return func(ctx context.Context, s *side, do steps) error {
			stream, err := s.streams.Read(ctx, &bytestream.ReadRequest{ReadLimit: n})
			if n == 0 {
				do.kill()
				do.restart()
			}
			got := ""
			for err == nil {
				var m *bytestream.ReadResponse
				if m, err = stream.Recv(); err == nil {
					got += string(m.Data)
				}
				if int64(len(got)) == n && err == nil {
					do.kill()
					do.restart()
				}
			}
			if !errors.Is(err, io.EOF) {
				return err
			}
			if got != strings.Repeat("x", int(n))+"y" {
				t.Errorf("read %q", got)
			}
			return nil
		}
	}
	write := func(sizes ...int) func(ctx context.Context, s *side, do steps) error {
		return func(ctx context.Context, s *side, do steps) error {
			stream, err := s.streams.Write(ctx)
			if err != nil {
				return err
			}
			offset := 0
			for i, n := range sizes {
				if err := stream.Send(&bytestream.WriteRequest{WriteOffset: int64(offset), Data: make([]byte, n)}); err != nil && !errors.Is(err, io.EOF) {
					return err
				}
				switch offset += n; i {
				case 1:
					do.kill()
				case 2: // sent to nobody
					do.restart()
				}
			}
			resp, err := stream.CloseAndRecv()
			if err == nil && resp.CommittedSize != int64(offset) {
				t.Errorf("committed %d bytes, want %d", resp.CommittedSize, offset)
			}
			return err
		}
	}
	for _, tc := range []struct {
		name string
		call func(ctx context.Context, s *side, do steps) error
		want codes.Code
	}{
		{"unary", func(ctx context.Context, s *side, do steps) error {
			done := make(chan error, 1)
			go func() {
				_, err := s.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{})
				done <- err
			}()
			do.kill()
			do.restart()
			return receive(t, done)
		}, codes.OK},
		{"read, nothing received", read(0), codes.OK},
		{"read, some received", read(2), codes.Unavailable},
		{"write, all kept", write(16<<10, 16<<10, 16<<10), codes.OK},
		{"write, more follows than is kept", write(16<<10, 16<<10, 64<<10, 16<<10, 1000), codes.OK},
		{"write, more was sent than is kept", write(16<<10, 64<<10, 16<<10), codes.Unavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := newAside()
			b := started(t, a.register)
			s := relayTo(t, relay.Options{}, b)
			err := tc.call(t.Context(), s, steps{
				kill: func() {
					receive(t, a.begun)
					b.kill(t)
					for tc.want == codes.OK && s.relay.Waiting() == 0 && t.Context().Err() == nil {
						runtime.Gosched() // until the call waits for the next attempt
					}
				},
				restart: func() { b.start(t) },
			})
			if gstatus.Code(err) != tc.want {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
}

// TestRelay_saysUnavailable: a storage that says so itself is asked again, unless
// that was about an asset's origin.
func TestRelay_saysUnavailable(t *testing.T) {
	var calls, data int
	f := &fake{
		find: func(context.Context, *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
			if calls++; calls < 4 {
				return nil, gstatus.Error(codes.Unavailable, "not now")
			}
			return &repb.FindMissingBlobsResponse{}, nil
		},
		fetch: func(context.Context, *assetpb.FetchBlobRequest) (*assetpb.FetchBlobResponse, error) {
			calls++
			return nil, gstatus.Error(codes.Unavailable, "the origin is away")
		},
		write: func(s bytestream.ByteStream_WriteServer) error {
			calls++
			for {
				r, err := s.Recv()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					return err
				}
				data += len(r.Data)
			}
			if calls < 4 {
				return gstatus.Error(codes.Unavailable, "not now")
			}
			return s.SendAndClose(&bytestream.WriteResponse{})
		},
	}
	reg := prometheus.NewPedanticRegistry()
	s := relayTo(t, relay.Options{Registerer: reg}, started(t, f.register))
	if _, err := s.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{}); err != nil || calls != 4 {
		t.Errorf("find: %v after %d calls", err, calls)
	}
	calls = 0
	stream, err := s.streams.Write(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := stream.Send(&bytestream.WriteRequest{Data: make([]byte, 1000)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := stream.CloseAndRecv(); err != nil || calls != 4 || data != 12_000 {
		t.Errorf("write: %v after %d calls and %d bytes; want 4 and 12000", err, calls, data)
	}
	calls = 0
	_, err = assetpb.NewFetchClient(s.conn).FetchBlob(t.Context(), &assetpb.FetchBlobRequest{})
	if gstatus.Convert(err).Message() != "the origin is away" || calls != 1 {
		t.Errorf("fetch: %v after %d calls, want what the storage said, once", err, calls)
	}
	none := relayTo(t, relay.Options{NoAssets: true}, started(t, f.register))
	if _, err := assetpb.NewFetchClient(none.conn).FetchBlob(t.Context(), &assetpb.FetchBlobRequest{}); gstatus.Code(err) != codes.Unimplemented {
		t.Errorf("fetch with NoAssets: %v, want UNIMPLEMENTED", err)
	}
	want := strings.NewReader(`
# HELP elan_relay_repeated_total Storage calls made again because the storage could not be reached, or said so.
# TYPE elan_relay_repeated_total counter
elan_relay_repeated_total 6
`)
	if err := testutil.GatherAndCompare(reg, want, "elan_relay_repeated_total"); err != nil {
		t.Error(err)
	}
	if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, %v", problems, err)
	}
}

// TestRelay_waitsNoLonger: nobody waits for ever, nor too many at once, nor past
// their deadline.
func TestRelay_waitsNoLonger(t *testing.T) {
	gone := newBackend(t, elan(t))
	for name, call := range map[string]func(ctx context.Context, s *side) error{
		"unary": func(ctx context.Context, s *side) error {
			_, err := s.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{})
			return err
		},
		"read": func(ctx context.Context, s *side) error {
			stream, err := s.streams.Read(ctx, &bytestream.ReadRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		},
		"write": func(ctx context.Context, s *side) error {
			stream, err := s.streams.Write(ctx)
			if err == nil {
				_, err = stream.CloseAndRecv()
			}
			return err
		},
		"capabilities": func(ctx context.Context, s *side) error {
			_, err := repb.NewCapabilitiesClient(s.conn).GetCapabilities(ctx, &repb.GetCapabilitiesRequest{})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // most of it is waiting
			if err := call(t.Context(), relayTo(t, relay.Options{Wait: 10 * time.Millisecond}, gone)); gstatus.Code(err) != codes.Unavailable {
				t.Errorf("after Options.Wait: %v, want UNAVAILABLE", err)
			}
			s := relayTo(t, relay.Options{Wait: time.Hour, MaxWaiting: 1}, gone)
			ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second) // a tenth of which is for the answer
			defer cancel()
			if err := call(ctx, s); gstatus.Code(err) != codes.Unavailable {
				t.Errorf("with a deadline: %v, want UNAVAILABLE before it", err)
			}
			ctx, leave := context.WithCancel(t.Context())
			first := make(chan error, 1)
			go func() { first <- call(ctx, s) }()
			for s.relay.Waiting() == 0 {
				if t.Context().Err() != nil {
					t.Fatal("the first call does not wait")
				}
			}
			if err := call(t.Context(), s); gstatus.Code(err) != codes.Unavailable {
				t.Errorf("one call too many: %v, want UNAVAILABLE", err)
			}
			leave()
			if err := receive(t, first); gstatus.Code(err) != codes.Canceled {
				t.Errorf("a call that was cancelled while it waited: %v", err)
			}
		})
	}
}

// TestRelay_Ready: it is ready while a server of the storage is.
func TestRelay_Ready(t *testing.T) {
	b := newBackend(t, (&fake{}).register)
	s := relayTo(t, relay.Options{}, b)
	if err := s.relay.Ready(t.Context()); err == nil {
		t.Error("without a storage: ready")
	}
	b.start(t)
	for s.relay.Ready(t.Context()) != nil { // until the connection is there again
		if t.Context().Err() != nil {
			t.Fatal("it does not get ready")
		}
	}
}

// TestRelay_drainingServerIsLeftOut: a server that says that it is shutting down gets no calls.
func TestRelay_drainingServerIsLeftOut(t *testing.T) {
	count := func(n *atomic.Int32) *fake {
		return &fake{find: func(context.Context, *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
			n.Add(1)
			return &repb.FindMissingBlobsResponse{}, nil
		}}
	}
	var na, nb atomic.Int32
	a, b := started(t, count(&na).register), started(t, count(&nb).register)
	s := relayTo(t, relay.Options{}, a, b)
	call := func() {
		t.Helper()
		if _, err := s.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	for na.Load() == 0 || nb.Load() == 0 {
		call() // until both have had one
	}
	a.health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	for before := int32(-1); before != na.Load(); {
		before = na.Load() // until it has heard of it
		for range 20 {
			call()
		}
	}
	before := nb.Load()
	for range 20 {
		call()
	}
	if n := nb.Load() - before; n != 20 {
		t.Errorf("%d of 20 calls went to the server that is left", n)
	}
}

// TestNew_refuses: what makes no sense.
func TestNew_refuses(t *testing.T) {
	conn := connect(t, []string{"localhost:1"})
	conns := []*grpc.ClientConn{conn}
	reg := prometheus.NewRegistry()
	if _, err := relay.New(relay.Options{Conns: conns, Registerer: reg}); err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]relay.Options{
		"no connection":      {},
		"negative wait":      {Conns: conns, Wait: -1},
		"negative number":    {Conns: conns, MaxWaiting: -1},
		"negative batch":     {Conns: conns, MaxBatchBytes: -1},
		"metrics were there": {Conns: conns, Registerer: reg},
	} {
		if _, err := relay.New(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestRelay_storageStops: a storage server that shuts down is not held up by the
// connections that watch its health, and no call is lost to that.
func TestRelay_storageStops(t *testing.T) {
	register := elan(t)
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server, h := rpc.NewServer()
	register(server)
	ctx, shutDown := context.WithCancel(t.Context())
	defer shutDown()
	done := make(chan error, 1)
	go func() {
		done <- rpc.Serve(ctx, server, rpc.ServeOptions{Listener: l, Health: h, Grace: time.Hour})
	}()
	other := started(t, register)
	s := relayTo(t, relay.Options{}, &backend{addr: l.Addr().String()}, other)
	for stopped := false; !stopped; {
		if _, err := s.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{}); err != nil {
			t.Fatal(err)
		}
		shutDown()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			stopped = true
		default:
		}
	}
}
