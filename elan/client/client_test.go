package client_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// register registers elan's services over a store in memory.
func register(t testing.TB, g *grpc.Server) {
	t.Helper()
	store, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	actions, err := action.New(action.Options{Store: store, Entries: store})
	if err != nil {
		t.Fatal(err)
	}
	failures, err := action.NewFailures(action.FailuresOptions{Entries: store})
	if err != nil {
		t.Fatal(err)
	}
	if err := rpc.Register(g, rpc.Options{Store: store, Actions: actions, Failures: failures}); err != nil {
		t.Fatal(err)
	}
}

// start returns a connection to a server in this process.
func start(t testing.TB, register func(testing.TB, *grpc.Server), opts ...grpc.ServerOption) *grpc.ClientConn {
	t.Helper()
	g := grpc.NewServer(opts...)
	register(t, g)
	l := bufconn.Listen(1 << 20)
	done := make(chan error)
	go func() { done <- g.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:bufconn",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		g.Stop()
		if err := <-done; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // before it served
			t.Error(err)
		}
	})
	return conn
}

func newClient(t testing.TB, o client.Options) *client.Client {
	t.Helper()
	c, err := client.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestClient(t *testing.T) {
	blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store {
		return newClient(t, client.Options{Conn: start(t, register), Instance: "some/instance"})
	}})
}

func TestClient_small_chunks(t *testing.T) {
	blobtest.Run(t, blobtest.Options{LargeBytes: 100_001, New: func(t testing.TB) blob.Store {
		return newClient(t, client.Options{Conn: start(t, register), ChunkBytes: 1000, MaxDigests: 3})
	}})
}

func TestClient_actions(t *testing.T) {
	c := newClient(t, client.Options{Conn: start(t, register)})
	for _, fn := range digest.Functions() {
		k := blob.EntryKey{Instance: "i/j", Action: digest.Of(fn, []byte("action"))}
		if _, err := c.Get(t.Context(), k); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("Get of nothing: %v, want ErrNotFound", err)
		}
		out := digest.Of(fn, []byte("out"))
		want := &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "out", Digest: out.Proto()}}}
		err := c.Put(t.Context(), k, want)
		var missing *blob.MissingError
		if !errors.As(err, &missing) || len(missing.Digests) != 1 || missing.Digests[0] != out {
			t.Errorf("Put of an incomplete result: %v, want a MissingError of %s", err, out)
		}
		if err := blob.ReceiveBytes(t.Context(), c, out, []byte("out")); err != nil {
			t.Fatal(err)
		}
		if err := c.Put(t.Context(), k, want); err != nil {
			t.Fatal(err)
		}
		got, err := c.Get(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		if err := c.Put(t.Context(), k, &repb.ActionResult{ExitCode: 1}); !errors.Is(err, action.ErrNotCacheable) {
			t.Errorf("Put of a failed result: %v, want ErrNotCacheable", err)
		}
	}
}

// What failed is kept there as it is here: with its status, and as no result.
func TestClient_failures(t *testing.T) {
	c := newClient(t, client.Options{Conn: start(t, register)})
	for name, want := range map[string]*repb.ExecuteResponse{
		"exit code": {Result: &repb.ActionResult{ExitCode: 3, ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w"}}},
		"timeout": {
			Result: &repb.ActionResult{StdoutDigest: digest.Of(digest.SHA256, []byte("printed")).Proto()},
			Status: &spb.Status{Code: int32(codes.DeadlineExceeded), Message: "it took too long"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := blob.EntryKey{Instance: "i/j", Action: digest.Of(digest.SHA256, []byte(name))}
			given := proto.CloneOf(want)
			if err := c.Failures().Put(t.Context(), k, given); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, given, protocmp.Transform()); diff != "" {
				t.Errorf("the caller's message was changed (-want +got)\n%s", diff)
			}
			r, err := c.Get(t.Context(), blob.EntryKey{Instance: action.FailedInstance("i/j"), Action: k.Action})
			if err != nil {
				t.Fatal(err)
			}
			got := action.FailedResponse(r)
			if len(got.Result.GetExecutionMetadata().GetAuxiliaryMetadata()) != 0 || got.Result.ExitCode != want.Result.ExitCode {
				t.Errorf("got %v", got)
			}
			if diff := cmp.Diff(want.Status, got.Status, protocmp.Transform()); diff != "" {
				t.Errorf("status (-want +got)\n%s", diff)
			}
			if _, err := c.Get(t.Context(), k); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("its result: %v, want ErrNotFound", err)
			}
		})
	}
	if err := c.Failures().Put(t.Context(), blob.EntryKey{Action: digest.Of(digest.SHA256, nil)}, &repb.ExecuteResponse{}); !errors.Is(err, action.ErrInvalid) {
		t.Errorf("put of nothing: %v, want ErrInvalid", err)
	}
}

// refusing is a CAS that answers everything with one error.
type refusing struct {
	repb.UnimplementedContentAddressableStorageServer
	code codes.Code
}

func (r refusing) FindMissingBlobs(context.Context, *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
	return nil, gstatus.Error(r.code, "because")
}

func TestClient_classes_of_errors(t *testing.T) {
	for code, want := range map[codes.Code]error{
		codes.NotFound:          blob.ErrNotFound,
		codes.ResourceExhausted: blob.ErrFull,
		codes.Unavailable:       blob.ErrUnavailable,
		codes.Canceled:          context.Canceled,
		codes.DeadlineExceeded:  context.DeadlineExceeded,
	} {
		t.Run(code.String(), func(t *testing.T) {
			conn := start(t, func(_ testing.TB, g *grpc.Server) {
				repb.RegisterContentAddressableStorageServer(g, refusing{code: code})
			})
			_, err := newClient(t, client.Options{Conn: conn}).FindMissing(t.Context(), []digest.Digest{digest.Of(digest.SHA256, []byte("x"))})
			if !errors.Is(err, want) {
				t.Errorf("FindMissing: %v, want %v", err, want)
			}
		})
	}
	t.Run("no class", func(t *testing.T) {
		conn := start(t, func(_ testing.TB, g *grpc.Server) {
			repb.RegisterContentAddressableStorageServer(g, refusing{code: codes.PermissionDenied})
		})
		_, err := newClient(t, client.Options{Conn: conn}).FindMissing(t.Context(), []digest.Digest{digest.Of(digest.SHA256, []byte("x"))})
		if gstatus.Code(err) != codes.PermissionDenied || errors.Is(err, blob.ErrNotFound) {
			t.Errorf("FindMissing: %v, want PERMISSION_DENIED as it came", err)
		}
	})
}

// forgetful is a CAS that says of every second blob that it is missing, twice.
type forgetful struct {
	repb.UnimplementedContentAddressableStorageServer
}

func (forgetful) FindMissingBlobs(_ context.Context, req *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
	resp := &repb.FindMissingBlobsResponse{}
	for i := len(req.BlobDigests) - 1; i >= 0; i -= 2 {
		resp.MissingBlobDigests = append(resp.MissingBlobDigests, req.BlobDigests[i], req.BlobDigests[i])
	}
	return resp, nil
}

func TestFindMissing_of_a_server_in_another_order(t *testing.T) {
	conn := start(t, func(_ testing.TB, g *grpc.Server) { repb.RegisterContentAddressableStorageServer(g, forgetful{}) })
	var ds, want []digest.Digest
	for i := range 100 {
		ds = append(ds, digest.Of(digest.SHA256, fmt.Append(nil, i)))
		if i%2 == 1 {
			want = append(want, ds[i])
		}
	}
	got, err := newClient(t, client.Options{Conn: conn}).FindMissing(t.Context(), append(ds, ds...))
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("FindMissing: %d, %v, want 50 in the order asked", len(got), err)
	}
}

func TestDial(t *testing.T) {
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	register(t, g)
	done := make(chan error)
	go func() { done <- g.Serve(l) }()
	conn, err := client.Dial(t.Context(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newClient(t, client.Options{Conn: conn}).FindMissing(t.Context(), []digest.Digest{digest.Of(digest.SHA1, []byte("x"))}); err != nil {
		t.Error(err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	g.Stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := client.Dial(t.Context(), l.Addr().String()); !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("Dial where nobody listens: %v, want ErrUnavailable", err)
	}
}
