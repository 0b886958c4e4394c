package tracing_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/trace"
	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/metrics/spans"
	"github.com/mettle-build/mettle/metrics/tracing"
	"github.com/mettle-build/mettle/metrics/tracing/tracingtest"
)

const (
	header     = "build.bazel.remote.execution.v2.requestmetadata-bin"
	invocation = "2e62f5e0-2a3a-4a3d-9c3b-0d0d4f7d6a11"
	traceID    = "2e62f5e02a3a4a3d9c3b0d0d4f7d6a11"
	other      = "0af7651916cd43dd8448eb211c80319c"
)

// requestMetadata is that of a call of Bazel's.
func requestMetadata(t testing.TB, invocation string) string {
	t.Helper()
	data, err := proto.Marshal(&repb.RequestMetadata{
		ToolDetails: &repb.ToolDetails{ToolName: "bazel"}, ToolInvocationId: invocation, TargetId: strings.Repeat("é", 1000),
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func newTracer(t testing.TB, o tracing.Options) *tracing.Tracer {
	t.Helper()
	tr, err := tracing.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func closeTracer(t testing.TB, tr *tracing.Tracer) {
	t.Helper()
	if err := tr.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

// service answers by what the resource name asks for. With a next it asks that first.
type service struct {
	bspb.UnimplementedByteStreamServer
	next bspb.ByteStreamClient
	seen chan metadata.MD // of each call
}

func (s *service) QueryWriteStatus(ctx context.Context, r *bspb.QueryWriteStatusRequest) (*bspb.QueryWriteStatusResponse, error) {
	if s.next != nil {
		return s.next.QueryWriteStatus(ctx, r)
	}
	return &bspb.QueryWriteStatusResponse{}, s.answer(ctx, r.GetResourceName())
}

func (s *service) Read(r *bspb.ReadRequest, ss bspb.ByteStream_ReadServer) error {
	if s.next == nil {
		if err := ss.Send(&bspb.ReadResponse{}); err != nil {
			return err
		}
		return s.answer(ss.Context(), r.GetResourceName())
	}
	cs, err := s.next.Read(ss.Context(), r)
	if err != nil {
		return err
	}
	for {
		m, err := cs.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := ss.Send(m); err != nil {
			return err
		}
	}
}

func (s *service) answer(ctx context.Context, name string) error {
	if s.seen != nil {
		md, _ := metadata.FromIncomingContext(ctx)
		s.seen <- md
	}
	switch name {
	case "missing":
		return status.Error(codes.NotFound, "not there")
	case "broken":
		return status.Error(codes.Internal, "broken")
	case "gone":
		return status.Error(codes.Canceled, "gone")
	case "late":
		return fmt.Errorf("wait: %w", context.DeadlineExceeded)
	}
	return nil
}

// serve runs s, traced by tr, and returns a client, traced by caller.
func serve(t testing.TB, s *service, tr, caller *tracing.Tracer) bspb.ByteStreamClient {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	g := grpc.NewServer(tr.ServerOptions()...)
	bspb.RegisterByteStreamServer(g, s)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = g.Serve(l)
	}()
	conn, err := grpc.NewClient("passthrough:///test", append(caller.DialOptions(),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		g.GracefulStop() // interceptors have ended
		<-ended
	})
	return bspb.NewByteStreamClient(conn)
}

// chain is a server that passes calls on to another one, both traced to a collector.
func chain(t *testing.T, share float64) (c *tracingtest.Collector, client bspb.ByteStreamClient, seen chan metadata.MD, flush func()) {
	t.Helper()
	c = tracingtest.New(t)
	front := newTracer(t, tracing.Options{URL: c.URL(), Share: share, Service: "front"})
	back := newTracer(t, tracing.Options{URL: c.URL(), Share: 1, Service: "back"})
	seen = make(chan metadata.MD, 100)
	next := serve(t, &service{seen: seen}, back, front)
	client = serve(t, &service{next: next}, front, nil)
	return c, client, seen, func() { closeTracer(t, front); closeTracer(t, back) }
}

// end is a stream's, read to it.
func end(s grpc.ServerStreamingClient[bspb.ReadResponse], err error) error {
	for err == nil {
		_, err = s.Recv()
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

const queryTree = `front server: google.bytestream.ByteStream/QueryWriteStatus
  front client: google.bytestream.ByteStream/QueryWriteStatus
    back server: google.bytestream.ByteStream/QueryWriteStatus
`

func TestTracer_calls(t *testing.T) {
	long := strings.Repeat("x", 3000)
	for _, tc := range []struct {
		name    string
		share   float64
		headers []string
		trace   string // "": any; "-": none
		parent  string
		state   string
	}{
		{"of an invocation", 1, []string{header, requestMetadata(t, invocation)}, traceID, "", ""},
		{"of an invocation that is none of the share", 0, []string{header, requestMetadata(t, invocation)}, "-", "", ""},
		{"a name that is no UUID", 1, []string{header, requestMetadata(t, "nightly")}, "2a3b62b53ddb9f167b63d22202a36081", "", ""},
		{"of nobody", 1, nil, "", "", ""},
		{"of nobody, without a share", 0, nil, "-", "", ""},
		{"metadata that is none", 1, []string{header, "\xff\xff"}, "", "", ""},
		{"metadata that is too long", 1, []string{header, requestMetadata(t, strings.Repeat("x", 9<<10))}, "", "", ""},
		{
			"a parent that is recorded", 0,
			[]string{"traceparent", "00-" + other + "-b7ad6b7169203331-01", "tracestate", "v=1", header, requestMetadata(t, invocation)},
			other, "b7ad6b7169203331", "v=1",
		},
		{"a parent that is not", 1, []string{"traceparent", "00-" + other + "-b7ad6b7169203331-00"}, "-", "", ""},
		{"a parent that is none", 1, []string{"traceparent", "00-zz-b7ad6b7169203331-01", header, requestMetadata(t, invocation)}, traceID, "", ""},
		{"a parent that is endless", 1, []string{"traceparent", "00-" + other + "-b7ad6b7169203331-01-" + long, header, requestMetadata(t, invocation)}, traceID, "", ""},
		{"a state that is endless", 1, []string{"traceparent", "00-" + other + "-b7ad6b7169203331-01", "tracestate", "v=" + long}, other, "b7ad6b7169203331", ""},
		{"a state that is none", 1, []string{"traceparent", "00-" + other + "-b7ad6b7169203331-01", "tracestate", "v"}, other, "b7ad6b7169203331", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, client, seen, flush := chain(t, tc.share)
			ctx := metadata.AppendToOutgoingContext(t.Context(), tc.headers...)
			if _, err := client.QueryWriteStatus(ctx, &bspb.QueryWriteStatusRequest{}); err != nil {
				t.Fatal(err)
			}
			if err := end(client.Read(ctx, &bspb.ReadRequest{})); err != nil {
				t.Fatal(err)
			}
			flush()
			got := c.Spans()
			if tc.trace == "-" {
				if len(got) > 0 {
					t.Errorf("spans:\n%s", tracingtest.Tree(got))
				}
				if md := <-seen; len(md["traceparent"]) != 1 || !strings.HasSuffix(md["traceparent"][0], "-00") {
					t.Errorf("the other server got the parent %v, want one that is not recorded", md["traceparent"])
				}
				return
			}
			want := queryTree + strings.ReplaceAll(queryTree, "QueryWriteStatus", "Read")
			if diff := cmp.Diff(want, tracingtest.Tree(got)); diff != "" {
				t.Fatalf("spans (-want +got):\n%s", diff)
			}
			for _, s := range got {
				if tc.trace != "" && s.Trace != tc.trace {
					t.Errorf("%s %s is of trace %s, want %s", s.Service, s.Name, s.Trace, tc.trace)
				}
				if s.Service == "front" && s.Kind == "server" && s.Parent != tc.parent {
					t.Errorf("%s has the parent %q, want %q", s.Name, s.Parent, tc.parent)
				}
				for k, v := range s.Attributes {
					if len(v) > spans.MaxText {
						t.Errorf("%s has %d bytes", k, len(v))
					}
				}
			}
			for range 2 {
				md := <-seen
				if len(md["traceparent"]) != 1 || strings.Join(md["tracestate"], ",") != tc.state {
					t.Errorf("the other server got the parents %v with the state %v, want one with %q", md["traceparent"], md["tracestate"], tc.state)
				}
			}
		})
	}
}

// What is an error of a span. To whom a caller is gone, that is one, and not to who
// made the call, and may have ended it.
func TestTracer_status(t *testing.T) {
	c, client, _, flush := chain(t, 1)
	for name, want := range map[string]codes.Code{"": codes.OK, "missing": codes.NotFound, "broken": codes.Internal, "gone": codes.Canceled, "late": codes.DeadlineExceeded} {
		if _, err := client.QueryWriteStatus(t.Context(), &bspb.QueryWriteStatusRequest{ResourceName: name}); status.Code(err) != want {
			t.Errorf("%q: %v, want %v", name, err, want)
		}
		if err := end(client.Read(t.Context(), &bspb.ReadRequest{ResourceName: name})); status.Code(err) != want {
			t.Errorf("%q: %v, want %v", name, err, want)
		}
	}
	flush()
	got := map[string]int{}
	for _, s := range c.Spans() {
		if s.Service == "front" && s.Kind == "client" || s.Service == "back" {
			got[s.Kind+" "+s.Attributes["rpc.grpc.status_code"]+" "+s.Error]++
		}
	}
	want := map[string]int{
		"server 1 Canceled: gone": 2, "client 1 ": 2,
		"server 0 ": 2, "server 5 ": 2, "server 13 Internal: broken": 2, "server 4 DeadlineExceeded: wait: context deadline exceeded": 2,
		"client 0 ": 2, "client 5 ": 2, "client 13 Internal: broken": 2, "client 4 DeadlineExceeded: wait: context deadline exceeded": 2,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("codes and errors (-want +got):\n%s", diff)
	}
}

// A share of the builds is taken, and of one build all or nothing.
func TestTracer_share(t *testing.T) {
	c := tracingtest.New(t)
	tr := newTracer(t, tracing.Options{URL: c.URL(), Share: 0.25, Service: "s"})
	const builds = 400
	want := 0
	for i := range builds {
		md := requestMetadata(t, fmt.Sprintf("%08x-2a3a-4a3d-9c3b-0d0d4f7d6a11", i+1))
		var recorded []bool
		for range 3 {
			_, span := tr.Attempt(t.Context(), tracing.Job{RequestMetadata: []byte(md)})
			recorded = append(recorded, span.IsRecording())
			span.End()
		}
		if recorded[0] != recorded[1] || recorded[0] != recorded[2] {
			t.Errorf("of build %d, %v are recorded", i, recorded)
		}
		if recorded[0] {
			want += 3
		}
	}
	closeTracer(t, tr)
	if got := len(c.Spans()); got != want || got < 3*builds/8 || got > 3*builds/8*3 {
		t.Errorf("%d spans, want %d, a quarter of %d", got, want, 3*builds)
	}
}

func TestTracer_Attempt(t *testing.T) {
	published := time.Now().Add(-time.Second).UTC()
	parent := "00-" + other + "-b7ad6b7169203331-01"
	for _, tc := range []struct {
		name string
		job  tracing.Job
		want string // the tree
	}{
		{"the first", tracing.Job{Context: map[string]string{"traceparent": parent, spans.KeyPublished: published.Format(time.RFC3339Nano)}, Attempt: 1}, "w internal: queue\nw consumer: attempt\n  w internal: part\n"},
		{"another", tracing.Job{Context: map[string]string{"traceparent": parent, spans.KeyPublished: published.Format(time.RFC3339Nano)}, Attempt: 2}, "w consumer: attempt\n  w internal: part\n"},
		{"of a server whose clock is ahead", tracing.Job{Context: map[string]string{"traceparent": parent, spans.KeyPublished: "2999-01-01T00:00:00Z"}, Attempt: 1}, "w consumer: attempt\n  w internal: part\n"},
		{"of a server without traces", tracing.Job{RequestMetadata: []byte(requestMetadata(t, invocation)), Attempt: 1}, "w consumer: attempt\n  w internal: part\n"},
		{"of a server that records nothing", tracing.Job{Context: map[string]string{"traceparent": parent[:53] + "00"}, Attempt: 1}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := tracingtest.New(t)
			tr := newTracer(t, tracing.Options{URL: c.URL(), Share: 1, Service: "w"})
			ctx, span := tr.Attempt(t.Context(), tc.job)
			_, part := spans.Start(ctx, "part")
			spans.End(part, nil)
			spans.End(span, errors.New("\xfflate"))
			closeTracer(t, tr)
			got := c.Spans()
			if diff := cmp.Diff(tc.want, tracingtest.Tree(got)); diff != "" {
				t.Errorf("spans (-want +got):\n%s", diff)
			}
			for _, s := range got {
				switch s.Name {
				case "queue":
					if !s.Start.Equal(published) || s.End.Before(s.Start) || s.Parent != "b7ad6b7169203331" {
						t.Errorf("in the queue from %v to %v, within %s; want from %v", s.Start, s.End, s.Parent, published)
					}
				case "attempt":
					if s.Error != "late" || s.Attributes[spans.KeyAttempt] != fmt.Sprint(tc.job.Attempt) {
						t.Errorf("the attempt has the error %q and %v", s.Error, s.Attributes)
					}
				}
			}
			if tc.job.Context == nil && got[0].Trace != traceID {
				t.Errorf("it is of trace %s, want that of the invocation, %s", got[0].Trace, traceID)
			}
		})
	}
}

// What a job asks of the storage is of its trace.
func TestTracer_storage(t *testing.T) {
	c := tracingtest.New(t)
	tr := newTracer(t, tracing.Options{URL: c.URL(), Share: 1})
	defer closeTracer(t, tr)
	seen := make(chan metadata.MD, 1)
	client := serve(t, &service{seen: seen}, nil, tr)
	md := requestMetadata(t, invocation)
	ctx, span := tr.Attempt(t.Context(), tracing.Job{RequestMetadata: []byte(md)})
	defer span.End()
	if _, err := client.QueryWriteStatus(ctx, &bspb.QueryWriteStatusRequest{}); err != nil {
		t.Fatal(err)
	}
	got := <-seen
	if sc := trace.SpanContextFromContext(ctx); !strings.HasPrefix(got["traceparent"][0], "00-"+traceID) || strings.Contains(got["traceparent"][0], sc.SpanID().String()) {
		t.Errorf("the parent is %v, want a span of its own within %s", got["traceparent"], traceID)
	}
}

// With no collector, nothing is there at all.
func TestTracer_off(t *testing.T) {
	var none *tracing.Tracer
	for name, tr := range map[string]*tracing.Tracer{"no collector": newTracer(t, tracing.Options{Share: 1}), "nil": none} {
		if tr.On() || len(tr.ServerOptions())+len(tr.DialOptions()) > 0 {
			t.Errorf("%s: there are interceptors", name)
		}
		if allocs := testing.AllocsPerRun(100, func() {
			_, span := tr.Attempt(t.Context(), tracing.Job{})
			span.End()
		}); allocs > 0 {
			t.Errorf("%s: an attempt allocates %v times", name, allocs)
		}
		closeTracer(t, tr)
	}
}

func TestNew_refuses(t *testing.T) {
	for name, o := range map[string]tracing.Options{
		"a share above 1":  {Share: 1.5},
		"a negative share": {Share: -0.1},
		"a negative queue": {Queue: -1},
		"no scheme":        {URL: "localhost:4317"},
		"no port":          {URL: "grpc://localhost"},
		"a path of gRPC":   {URL: "grpc://localhost:4317/v1/traces"},
		"a password":       {URL: "http://me:secret@localhost:4318/v1/traces"},
		"another scheme":   {URL: "udp://localhost:6831"},
	} {
		if _, err := tracing.New(t.Context(), o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
