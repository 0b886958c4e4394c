package doctor_test

import (
	"context"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/mettle/doctor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// executor answers Execute as a test wants it.
type executor struct {
	repb.UnimplementedExecutionServer
	store  blob.Store
	answer func(word string) *repb.ExecuteResponse
}

// Execute "runs" what doctor asks for, which prints one word.
func (e *executor) Execute(r *repb.ExecuteRequest, s repb.Execution_ExecuteServer) error {
	a, c := &repb.Action{}, &repb.Command{}
	for _, m := range []struct {
		digest *repb.Digest
		to     proto.Message
	}{{r.ActionDigest, a}, {nil, c}} {
		d := m.digest
		if d == nil {
			d = a.CommandDigest
		}
		of, err := digest.FromProto(digest.SHA256, d)
		if err != nil {
			return err
		}
		if err := blob.ReadMessage(s.Context(), e.store, of, 1<<20, m.to); err != nil {
			return err
		}
	}
	resp := e.answer(strings.TrimPrefix(c.Arguments[2], "echo "))
	if resp == nil {
		<-s.Context().Done()
		return s.Context().Err()
	}
	value, err := anypb.New(resp)
	if err != nil {
		return err
	}
	return s.Send(&longrunningpb.Operation{Name: "operations/1", Done: true, Result: &longrunningpb.Operation_Response{Response: value}})
}

func ran(word string, at time.Time) *repb.ExecuteResponse {
	now := timestamppb.New(at)
	return &repb.ExecuteResponse{CachedResult: true, Result: &repb.ActionResult{
		StdoutRaw: []byte(word + "\n"), ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w", QueuedTimestamp: now, WorkerStartTimestamp: now},
	}}
}

// examine looks at our own storage with an executor, and options of the server.
func examine(t *testing.T, answer func(word string) *repb.ExecuteResponse, opts ...grpc.ServerOption) []doctor.Finding {
	t.Helper()
	return examineIn(t.Context(), t, answer, opts...)
}

func examineIn(ctx context.Context, t *testing.T, answer func(word string) *repb.ExecuteResponse, opts ...grpc.ServerOption) []doctor.Finding {
	t.Helper()
	store, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	actions, err := action.New(action.Options{Store: store, Entries: store})
	if err != nil {
		t.Fatal(err)
	}
	srv, _ := rpc.NewServer(opts...)
	if err := rpc.Register(srv, rpc.Options{Store: store, Actions: actions, Execution: &repb.ExecutionCapabilities{ExecEnabled: true}}); err != nil {
		t.Fatal(err)
	}
	repb.RegisterExecutionServer(srv, &executor{store: store, answer: answer})
	l := bufconn.Listen(1 << 20)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///server", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = conn.Close()
		srv.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	}()
	c, err := client.New(client.Options{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	return doctor.Examine(ctx, doctor.Options{Conn: conn, Store: c, BandwidthBytes: 1 << 16, SlowCall: time.Hour, NarrowBytes: 1})
}

// TestExamine_noTLS: whoever calls a port with TLS without it sees no more of it than
// a connection that ends.
func TestExamine_noTLS(t *testing.T) {
	l := bufconn.Listen(1 << 16)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	conn, err := grpc.NewClient("passthrough:///server", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = conn.Close()
		_ = l.Close()
		<-ended
	}()
	for _, speaks := range []bool{true, false} {
		fs := doctor.Examine(t.Context(), doctor.Options{Conn: conn, SpeaksTLS: func(context.Context) bool { return speaks }})
		if len(fs) != 1 || fs[0].Outcome != doctor.Failure || strings.Contains(fs[0].Advice, "grpcs://") != speaks {
			t.Errorf("a port of which a look says %v found %v", speaks, fs)
		}
	}
}

func well(word string) *repb.ExecuteResponse { return ran(word, time.Now()) }

func TestExamine(t *testing.T) {
	refusing := func(method string, code codes.Code) grpc.ServerOption {
		return grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if strings.HasSuffix(info.FullMethod, method) {
				return nil, status.Error(code, "as the test wants it")
			}
			return h(ctx, req)
		})
	}
	caps := func(change func(*repb.ServerCapabilities)) grpc.ServerOption {
		return grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			resp, err := h(ctx, req)
			if c, ok := resp.(*repb.ServerCapabilities); ok {
				c = proto.CloneOf(c)
				change(c)
				resp = c
			}
			return resp, err
		})
	}
	for name, tc := range map[string]struct {
		answer func(word string) *repb.ExecuteResponse
		opts   []grpc.ServerOption
		worst  doctor.Outcome
		what   string // that is found
		says   string // in what was found, or in the advice
	}{
		"all is well":       {well, nil, doctor.OK, "clocks", "agree"},
		"unauthenticated":   {well, []grpc.ServerOption{refusing("GetCapabilities", codes.Unauthenticated)}, doctor.Failure, "answers", "--token_file"},
		"another service":   {well, []grpc.ServerOption{refusing("GetCapabilities", codes.Unimplemented)}, doctor.Failure, "answers", "not the Remote Execution API"},
		"no right to write": {well, []grpc.ServerOption{refusing("BatchUpdateBlobs", codes.PermissionDenied), denyWrites()}, doctor.Failure, "stores a blob", "grants the right"},
		"no right to set": {well, []grpc.ServerOption{caps(func(c *repb.ServerCapabilities) {
			c.CacheCapabilities.ActionCacheUpdateCapabilities.UpdateEnabled = false
		})}, doctor.Warning, "results of clients", "--noremote_upload_local_results"},
		"a cache alone":     {well, []grpc.ServerOption{caps(func(c *repb.ServerCapabilities) { c.ExecutionCapabilities = nil })}, doctor.Warning, "execution", "--remote_cache"},
		"refuses the old":   {well, []grpc.ServerOption{caps(func(c *repb.ServerCapabilities) { c.LowApiVersion.Minor = 3 })}, doctor.Warning, "old clients", "Bazel before 7"},
		"another's results": {well, []grpc.ServerOption{refusing("GetActionResult", codes.Internal)}, doctor.Failure, "action cache", "as the test wants it"},
		"a clock is wrong":  {func(word string) *repb.ExecuteResponse { return ran(word, time.Now().Add(-time.Hour)) }, nil, doctor.Warning, "clocks", "1h0m"},
		"prints another":    {func(string) *repb.ExecuteResponse { return ran("x", time.Now()) }, nil, doctor.Failure, "an action", "not that of the clients"},
		"no shell": {func(string) *repb.ExecuteResponse {
			return &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 127}}
		}, nil, doctor.Failure, "an action", "workers need /bin/sh"},
		"a property": {func(string) *repb.ExecuteResponse {
			return &repb.ExecuteResponse{Status: &spb.Status{Code: int32(codes.FailedPrecondition), Message: "gpu"}}
		}, nil, doctor.Failure, "an action", "exec_properties"},
		"keeps no results":   {func(word string) *repb.ExecuteResponse { r := well(word); r.CachedResult = false; return r }, nil, doctor.Warning, "the same action again", "executed again"},
		"answers with words": {well, []grpc.ServerOption{refusing("FindMissingBlobs", codes.ResourceExhausted)}, doctor.Failure, "latency", "a limit is reached"},
	} {
		t.Run(name, func(t *testing.T) {
			got := examine(t, tc.answer, tc.opts...)
			if w := doctor.Worst(got); w != tc.worst {
				t.Errorf("the worst is %v, want %v: %+v", w, tc.worst, got)
			}
			for _, f := range got {
				if f.What == tc.what && strings.Contains(f.Found+f.Advice, tc.says) {
					return
				}
			}
			t.Errorf("%q with %q is not among %+v", tc.what, tc.says, got)
		})
	}
}

// TestExamine_waits: an action that no worker takes is said to have waited for as long
// as it has, also where whoever asked has had enough of it.
func TestExamine_waits(t *testing.T) {
	for name, tc := range map[string]struct {
		patience time.Duration
		want     string
	}{
		"to its end":  {time.Hour, "for 2m0s"},
		"interrupted": {30 * time.Second, "for 30s"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), tc.patience)
				defer cancel()
				got := examineIn(ctx, t, func(string) *repb.ExecuteResponse { return nil })
				if f := got[len(got)-1]; f.What != "an action" || f.Outcome != doctor.Failure || !strings.HasSuffix(f.Found, tc.want) {
					t.Errorf("found %+v, want a failure that ends with %q", f, tc.want)
				}
			})
		})
	}
}

func denyWrites() grpc.ServerOption {
	return grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
		if strings.HasSuffix(info.FullMethod, "/Write") {
			return status.Error(codes.PermissionDenied, "as the test wants it")
		}
		return h(srv, ss)
	})
}
