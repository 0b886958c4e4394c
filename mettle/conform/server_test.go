package conform_test

import (
	"bytes"
	"context"
	"net"
	"regexp"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/mettle/conform"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve is a connection to our own storage, with options of a test.
func serve(t *testing.T, opts ...grpc.ServerOption) *grpc.ClientConn {
	t.Helper()
	store, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	blobs, err := chunked.New(chunked.Options{Store: store, Entries: store})
	if err != nil {
		t.Fatal(err)
	}
	actions, err := action.New(action.Options{Store: blobs, Entries: blobs})
	if err != nil {
		t.Fatal(err)
	}
	srv, _ := rpc.NewServer(opts...)
	if err := rpc.Register(srv, rpc.Options{Store: blobs, Actions: actions}); err != nil {
		t.Fatal(err)
	}
	l := bufconn.Listen(1 << 20)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///server", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		srv.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return conn
}

func TestRun(t *testing.T) {
	results, err := conform.Run(t.Context(), conform.Options{Conn: serve(t), Instance: "team/main", Parallel: 4})
	if err != nil {
		t.Fatal(err)
	}
	var report bytes.Buffer
	if err := conform.Report(&report, results); err != nil {
		t.Fatal(err)
	}
	s := conform.Summarize(results)
	if s.FailedMust > 0 || s.FailedShould > 0 || s.Passed < 130 {
		t.Errorf("our own storage:\n%s", &report)
	}
	if !strings.Contains(report.String(), s.String()) {
		t.Errorf("the report does not say %q:\n%s", s, &report)
	}
	for _, r := range results {
		if strings.HasPrefix(r.Case.Name, "execute/") && r.Outcome != conform.Skipped {
			t.Errorf("%s: %v, and the server executes nothing", r.Case.Name, r.Outcome)
		}
	}
}

// TestRun_broken breaks one thing after the other, each of which the case for it
// finds.
func TestRun_broken(t *testing.T) {
	unary := func(change func(req, resp any) any) grpc.ServerOption {
		return grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			resp, err := h(ctx, req)
			if err != nil {
				return resp, err
			}
			return change(req, resp), nil
		})
	}
	caps := func(change func(*repb.ServerCapabilities)) grpc.ServerOption {
		return unary(func(_, resp any) any {
			if c, ok := resp.(*repb.ServerCapabilities); ok {
				c = proto.CloneOf(c)
				change(c)
				return c
			}
			return resp
		})
	}
	for name, option := range map[string]grpc.ServerOption{
		"capabilities/symlinks": caps(func(c *repb.ServerCapabilities) { c.CacheCapabilities.SymlinkAbsolutePathStrategy = 0 }),
		"capabilities/versions": caps(func(c *repb.ServerCapabilities) { c.LowApiVersion = nil }),
		"capabilities/no_unknown_function": caps(func(c *repb.ServerCapabilities) {
			c.CacheCapabilities.DigestFunctions = append(c.CacheCapabilities.DigestFunctions, 0)
		}),
		"find_missing/absent": unary(func(req, resp any) any {
			if _, ok := req.(interface {
				GetBlobDigests() []*repb.Digest
			}); ok {
				return &repb.FindMissingBlobsResponse{}
			}
			return resp
		}),
		"action_cache/not_for_another_action": grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if _, ok := req.(*repb.GetActionResultRequest); ok {
				return &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w"}}, nil
			}
			return h(ctx, req)
		}),
		"write/one_message":     grpc.ChainStreamInterceptor(sends(func(r *bytestream.WriteResponse) { r.CommittedSize++ })),
		"get_tree/diamonds":     grpc.ChainStreamInterceptor(once),
		"compressed/read_limit": grpc.ChainStreamInterceptor(receives(func(r *bytestream.ReadRequest) { r.ReadLimit = 0 })),
		"read/offset":           grpc.ChainStreamInterceptor(receives(func(r *bytestream.ReadRequest) { r.ReadOffset = 0 })),
	} {
		t.Run(name, func(t *testing.T) {
			results, err := conform.Run(t.Context(), conform.Options{Conn: serve(t, option), Match: regexp.MustCompile("^" + name + "$")})
			if err != nil {
				t.Fatal(err)
			}
			if len(results) != 1 || results[0].Outcome != conform.Failed || len(results[0].Messages) == 0 {
				t.Errorf("%+v, want one case that fails and says why", results)
			}
		})
	}
}

// stream changes what goes through a stream.
type stream struct {
	grpc.ServerStream
	send, receive func(m any)
	sent          int
}

func (s *stream) SendMsg(m any) error {
	s.sent++
	if s.send != nil {
		s.send(m)
	}
	return s.ServerStream.SendMsg(m)
}

func (s *stream) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if err == nil && s.receive != nil {
		s.receive(m)
	}
	return err
}

func sends[M any](change func(M)) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
		return h(srv, &stream{ServerStream: ss, send: func(m any) {
			if m, ok := m.(M); ok {
				change(m)
			}
		}})
	}
}

func receives[M any](change func(M)) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
		return h(srv, &stream{ServerStream: ss, receive: func(m any) {
			if m, ok := m.(M); ok {
				change(m)
			}
		}})
	}
}

// once answers a GetTree with one directory.
func once(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
	if !strings.HasSuffix(info.FullMethod, "/GetTree") {
		return h(srv, ss)
	}
	if err := ss.RecvMsg(&repb.GetTreeRequest{}); err != nil {
		return err
	}
	return ss.SendMsg(&repb.GetTreeResponse{Directories: []*repb.Directory{{}}})
}

func TestRun_noServer(t *testing.T) {
	conn, err := grpc.NewClient("127.0.0.1:1", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conform.Run(t.Context(), conform.Options{Conn: conn}); err == nil || !strings.Contains(err.Error(), "capabilities") {
		t.Errorf("Run at a server that is not there: %v", err)
	}
}
