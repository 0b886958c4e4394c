package metrics_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/metrics"
)

// logging is a service that logs, and calls the next if there is one.
type logging struct {
	bspb.UnimplementedByteStreamServer
	log  *slog.Logger
	next bspb.ByteStreamClient
}

func (l *logging) QueryWriteStatus(ctx context.Context, r *bspb.QueryWriteStatusRequest) (*bspb.QueryWriteStatusResponse, error) {
	l.log.InfoContext(ctx, "asked")
	if l.next != nil {
		return l.next.QueryWriteStatus(ctx, r)
	}
	return &bspb.QueryWriteStatusResponse{}, answer(r.GetResourceName())
}

func (l *logging) Read(r *bspb.ReadRequest, s bspb.ByteStream_ReadServer) error {
	l.log.InfoContext(s.Context(), "read")
	return answer(r.GetResourceName())
}

// site serves over memory, and logs to a buffer.
type site struct {
	bspb.ByteStreamClient
	log *bytes.Buffer
}

// newSite starts a server, whose calls of the next carry the headers.
func newSite(t *testing.T, next bspb.ByteStreamClient, caller string, headers metrics.Headers) *site {
	t.Helper()
	s := &site{log: new(bytes.Buffer)}
	log, err := metrics.NewLogger(s.log, "json", "debug")
	if err != nil {
		t.Fatal(err)
	}
	r, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "site", Registerer: prometheus.NewRegistry(), Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	l := bufconn.Listen(1 << 16)
	server := grpc.NewServer(append(r.ServerOptions(), grpc.ChainUnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if caller != "" {
				metrics.SetCaller(ctx, caller)
			}
			return h(ctx, req)
		}))...)
	bspb.RegisterByteStreamServer(server, &logging{log: log, next: next})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.Serve(l)
	}()
	conn, err := grpc.NewClient("passthrough:///site", append(headers.DialOptions(),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.GracefulStop() // by when its last line is written
		<-ended
	})
	s.ByteStreamClient = bspb.NewByteStreamClient(conn)
	return s
}

func lines(t *testing.T, b *bytes.Buffer) (all []map[string]any) {
	t.Helper()
	for l := range strings.Lines(b.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(l), &m); err != nil {
			t.Fatalf("%v: %s", err, l)
		}
		all = append(all, m)
	}
	return all
}

// One call is followed by its name from the server that took it to the one behind,
// whose lines tell of the client, too.
func TestRequest_isPassedOn(t *testing.T) {
	md, err := proto.Marshal(&repb.RequestMetadata{ToolInvocationId: "inv", ActionId: "act"})
	if err != nil {
		t.Fatal(err)
	}
	var behind, front *site
	if !t.Run("calls", func(t *testing.T) {
		behind = newSite(t, nil, "", metrics.Passed)
		front = newSite(t, behind, "alice", func(context.Context) []string { return metrics.OfAction("op/1", md) })
		if _, err := front.QueryWriteStatus(t.Context(), &bspb.QueryWriteStatusRequest{ResourceName: "uploads/x"}); err != nil {
			t.Fatal(err)
		}
	}) {
		return
	}
	first := lines(t, front.log)
	if len(first) != 2 {
		t.Fatalf("%d lines in front, want what the handler says and the call: %s", len(first), front.log)
	}
	request := first[0]["request"]
	for i, line := range append(first, lines(t, behind.log)...) {
		want := map[string]any{"request": request, "invocation": "inv", "action_id": "act"}
		if i < 2 {
			want["operation"] = "op/1"
			want["caller"] = "alice"
		}
		for key := range map[string]bool{"request": true, "invocation": true, "action_id": true, "operation": true, "caller": true} {
			if d := cmp.Diff(want[key], line[key]); d != "" {
				t.Errorf("line %d, %s (-want +got):\n%s%v", i, key, d, line)
			}
		}
	}
	if r, ok := request.(string); !ok || len(r) < 10 {
		t.Errorf("the request is %v", request)
	}
	if got := first[1]["resource"]; got != "uploads/x" {
		t.Errorf("the call is of the resource %v", got)
	}
}

// A client whose call fails learns its name; one that sends a name of its own that
// is fit for a log has that one.
func TestRequest_isToldOfFailures(t *testing.T) {
	s := newSite(t, nil, "", nil)
	for _, tc := range []struct {
		name, resource, sent string
		told                 bool
	}{
		{"well", "fine", "", false},
		{"not found", "missing", "", false},
		{"deadline", "deadline", "", true},
		{"its own name", "deadline", "build-7", true},
		{"an odd name", "deadline", "two words", true},
		{"a long name", "deadline", strings.Repeat("x", 600), true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := t.Context()
			if tc.sent != "" {
				ctx = metadata.AppendToOutgoingContext(ctx, metrics.RequestHeader, tc.sent)
			}
			var unary, streamed metadata.MD
			_, _ = s.QueryWriteStatus(ctx, &bspb.QueryWriteStatusRequest{ResourceName: tc.resource}, grpc.Trailer(&unary))
			r, err := s.Read(ctx, &bspb.ReadRequest{ResourceName: tc.resource})
			if err != nil {
				t.Fatal(err)
			}
			_, _ = r.Recv()
			streamed = r.Trailer()
			for _, md := range []metadata.MD{unary, streamed} {
				got := md.Get(metrics.RequestHeader)
				if (len(got) == 1) != tc.told || tc.sent == "build-7" && !slices.Equal(got, []string{"build-7"}) ||
					tc.told && tc.sent != "build-7" && slices.Contains(got, tc.sent) {
					t.Errorf("the trailer has the name %q", got)
				}
			}
		})
	}
}

func TestRequest_ofNoCall(t *testing.T) {
	if r := metrics.Request(t.Context()); r != "" || metrics.Attrs(t.Context()) != nil || metrics.Passed(t.Context()) != nil {
		t.Errorf("what is no call is called %q", r)
	}
	metrics.SetCaller(t.Context(), "nobody") // which does nothing
}

// What is repeated all the time is not logged all the time, and what is left out is
// counted. Other messages, and those for debugging, are not concerned.
func TestNewLogger_leavesOutRepeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		log, err := metrics.NewLogger(&b, "json", "debug")
		if err != nil {
			t.Fatal(err)
		}
		for i := range 250 {
			log.With("n", i).Warn("the broker is away")
			log.Debug("detail")
		}
		log.Warn("something else")
		time.Sleep(time.Minute)
		log.Warn("the broker is away")
		log.Warn("the broker is away")
		for i := range 5000 { // of which only some are remembered
			log.Info(fmt.Sprint("message ", i)) //nolint:sloglint // many on purpose
		}
		counts := map[string]int{}
		var suppressed []any
		for _, l := range lines(t, &b) {
			counts[strings.Fields(l["msg"].(string))[0]]++
			if n, ok := l["suppressed"]; ok {
				suppressed = append(suppressed, n)
			}
		}
		if d := cmp.Diff(map[string]int{"the": 102, "detail": 250, "something": 1, "message": 5000}, counts); d != "" {
			t.Errorf("lines (-want +got):\n%s", d)
		}
		if d := cmp.Diff([]any{150.0}, suppressed); d != "" {
			t.Errorf("suppressed (-want +got):\n%s", d)
		}
	})
}

// Fields of the context are there once.
func TestNewLogger_fields(t *testing.T) {
	var b bytes.Buffer
	field := func(context.Context) []slog.Attr { return []slog.Attr{slog.String("operation", "of the context")} }
	log, err := metrics.NewLogger(&b, "text", "info", field)
	if err != nil {
		t.Fatal(err)
	}
	log.InfoContext(t.Context(), "a")
	log.With("operation", "said before").InfoContext(t.Context(), "c")
	log.InfoContext(t.Context(), "b", "operation", "said")
	log.WithGroup("g").With("k", 1).InfoContext(t.Context(), "c")
	if got := b.String(); strings.Count(got, `operation="of the context"`) != 2 || strings.Count(got, "operation=said") != 1 || strings.Count(got, `operation="said before"`) != 1 {
		t.Errorf("the log is %s", got)
	}
}
