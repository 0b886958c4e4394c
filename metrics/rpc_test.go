package metrics_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/metrics"
)

// fakeStreams answers by what the resource name asks for.
type fakeStreams struct {
	bspb.UnimplementedByteStreamServer
}

func (fakeStreams) QueryWriteStatus(_ context.Context, r *bspb.QueryWriteStatusRequest) (*bspb.QueryWriteStatusResponse, error) {
	return &bspb.QueryWriteStatusResponse{}, answer(r.GetResourceName())
}

func (fakeStreams) Read(r *bspb.ReadRequest, _ bspb.ByteStream_ReadServer) error {
	return answer(r.GetResourceName())
}

func answer(name string) error {
	switch name {
	case "panic":
		panic("secret state")
	case "missing":
		return status.Error(codes.NotFound, "not there")
	case "deadline":
		return fmt.Errorf("wait: %w", context.DeadlineExceeded)
	case "odd":
		return status.Error(codes.Code(99), "a code of nobody's")
	}
	return nil
}

// serve runs the fake behind the interceptors, over memory.
func serve(t *testing.T, o metrics.RPCOptions) bspb.ByteStreamClient {
	t.Helper()
	r, err := metrics.NewRPC(o)
	if err != nil {
		t.Fatal(err)
	}
	l := bufconn.Listen(1 << 16)
	s := grpc.NewServer(r.ServerOptions()...)
	bspb.RegisterByteStreamServer(s, &fakeStreams{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = s.Serve(l)
	}()
	c, err := grpc.NewClient("passthrough:///fake",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Close()
		s.Stop()
		<-ended
	})
	return bspb.NewByteStreamClient(c)
}

func TestRPC_countsByCode(t *testing.T) {
	reg := prometheus.NewRegistry()
	c := serve(t, metrics.RPCOptions{Prefix: "mettle", Registerer: reg})
	for _, name := range []string{"fine", "fine", "missing", "panic", "deadline", "odd"} {
		_, _ = c.QueryWriteStatus(t.Context(), &bspb.QueryWriteStatusRequest{ResourceName: name})
	}
	for _, name := range []string{"fine", "panic"} {
		s, err := c.Read(t.Context(), &bspb.ReadRequest{ResourceName: name})
		if err != nil {
			t.Fatal(err)
		}
		_, _ = s.Recv()
	}
	got := values(t, reg)
	const labels = `service="google.bytestream.ByteStream" method=`
	want := map[string]float64{
		`mettle_grpc_panics_total`: 2,

		`mettle_grpc_handled_total code="OK" ` + labels + `"QueryWriteStatus"`:               2,
		`mettle_grpc_handled_total code="NotFound" ` + labels + `"QueryWriteStatus"`:         1,
		`mettle_grpc_handled_total code="Internal" ` + labels + `"QueryWriteStatus"`:         1,
		`mettle_grpc_handled_total code="DeadlineExceeded" ` + labels + `"QueryWriteStatus"`: 1,
		`mettle_grpc_handled_total code="Unknown" ` + labels + `"QueryWriteStatus"`:          1,
		`mettle_grpc_handled_total code="OK" ` + labels + `"Read"`:                           1,
		`mettle_grpc_handled_total code="Internal" ` + labels + `"Read"`:                     1,
		`mettle_grpc_handling_seconds ` + labels + `"QueryWriteStatus"`:                      6,
		`mettle_grpc_handling_seconds ` + labels + `"Read"`:                                  2,
		`mettle_grpc_in_flight_calls ` + labels + `"QueryWriteStatus"`:                       0,
		`mettle_grpc_in_flight_calls ` + labels + `"Read"`:                                   0,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("metrics (-want +got):\n%s", d)
	}
}

func TestRPC_panicIsInternal(t *testing.T) {
	var log bytes.Buffer
	c := serve(t, metrics.RPCOptions{
		Prefix: "mettle", Registerer: prometheus.NewRegistry(), Logger: slog.New(slog.NewJSONHandler(&log, nil)),
	})
	_, err := c.QueryWriteStatus(t.Context(), &bspb.QueryWriteStatusRequest{ResourceName: "panic"})
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "secret") {
		t.Errorf("a panic gives %v, want INTERNAL without its value", err)
	}
	if _, err := c.QueryWriteStatus(t.Context(), &bspb.QueryWriteStatusRequest{}); err != nil {
		t.Errorf("after a panic: %v", err)
	}
	for _, want := range []string{`"handler panicked"`, "secret state", "fakeStreams", `"method":"QueryWriteStatus"`} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %s: %s", want, &log)
		}
	}
}

func TestRPC_logsRequestMetadata(t *testing.T) {
	md, err := proto.Marshal(&repb.RequestMetadata{
		ToolDetails:             &repb.ToolDetails{ToolName: "bazel", ToolVersion: "9.3.0"},
		ActionId:                "abc",
		ToolInvocationId:        "inv",
		CorrelatedInvocationsId: "corr",
		ActionMnemonic:          "CppCompile",
		TargetId:                strings.Repeat("x", 1000),
	})
	if err != nil {
		t.Fatal(err)
	}
	const header = "build.bazel.remote.execution.v2.requestmetadata-bin"
	for _, tc := range []struct {
		name  string
		level slog.Level
		md    string
		want  map[string]any
	}{
		{"debug", slog.LevelDebug, string(md), map[string]any{
			"msg": "rpc", "service": "google.bytestream.ByteStream", "method": "QueryWriteStatus", "code": "NotFound",
			"peer": "bufconn", "tool": "bazel 9.3.0", "invocation": "inv", "correlated_invocations": "corr",
			"action_id": "abc", "resource": "missing", "target": strings.Repeat("x", 256), "mnemonic": "CppCompile",
			"error": "rpc error: code = NotFound desc = not there",
		}},
		{"malformed metadata", slog.LevelDebug, "\xff\xff", map[string]any{
			"msg": "rpc", "service": "google.bytestream.ByteStream", "method": "QueryWriteStatus", "code": "NotFound",
			"peer": "bufconn", "resource": "missing", "error": "rpc error: code = NotFound desc = not there",
		}},
		{"info logs no call", slog.LevelInfo, string(md), nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var log bytes.Buffer
			c := serve(t, metrics.RPCOptions{
				Prefix: "mettle", Registerer: prometheus.NewRegistry(),
				Logger: slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: tc.level})),
			})
			ctx := metadata.AppendToOutgoingContext(t.Context(), header, tc.md)
			if _, err := c.QueryWriteStatus(ctx, &bspb.QueryWriteStatusRequest{ResourceName: "missing"}); status.Code(err) != codes.NotFound {
				t.Fatalf("got %v, want NOT_FOUND", err)
			}
			var got map[string]any
			if log.Len() > 0 {
				if err := json.Unmarshal(log.Bytes(), &got); err != nil {
					t.Fatalf("%v in %s", err, &log)
				}
				if d, ok := got["duration"].(float64); !ok || d <= 0 {
					t.Errorf("duration %v, want more than 0", got["duration"])
				}
				delete(got, "time")
				delete(got, "level")
				delete(got, "duration")
				if r, _ := got["request"].(string); len(r) < 10 {
					t.Errorf("request %q", r)
				}
				delete(got, "request")
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("log line (-want +got):\n%s", d)
			}
		})
	}
}

func TestRPC_boundsMethods(t *testing.T) {
	reg := prometheus.NewRegistry()
	r, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "elan", Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		info := &grpc.UnaryServerInfo{FullMethod: fmt.Sprintf("/some.Service/Method%d", i)}
		if _, err := r.Unary(t.Context(), nil, info, nothing); err != nil {
			t.Fatal(err)
		}
	}
	got := values(t, reg)
	n := 0
	for k := range got {
		if strings.HasPrefix(k, "elan_grpc_handled_total") {
			n++
		}
	}
	if n > 129 {
		t.Errorf("%d series for 1000 methods, want at most 129", n)
	}
	if k := `elan_grpc_handled_total code="OK" service="other" method="other"`; got[k] != 1000-128 {
		t.Errorf("%s is %v, want %d", k, got[k], 1000-128)
	}
}

// What a call takes is its name, and nothing else.
func TestRPC_allocatesOneThing(t *testing.T) {
	r, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "mettle", Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	info := &grpc.UnaryServerInfo{FullMethod: "/some.Service/Method"}
	ctx := t.Context()
	if n := testing.AllocsPerRun(100, func() { _, _ = r.Unary(ctx, nil, info, nothing) }); n > 1 {
		t.Errorf("%v allocations a call, want one", n)
	}
}

func TestNewRPC_refuses(t *testing.T) {
	taken := prometheus.NewRegistry()
	if _, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "mettle", Registerer: taken}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		o    metrics.RPCOptions
	}{
		{"no prefix", metrics.RPCOptions{Registerer: prometheus.NewRegistry()}},
		{"bad prefix", metrics.RPCOptions{Prefix: "9 lives", Registerer: prometheus.NewRegistry()}},
		{"no registerer", metrics.RPCOptions{Prefix: "mettle"}},
		{"names taken", metrics.RPCOptions{Prefix: "mettle", Registerer: taken}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := metrics.NewRPC(tc.o); err == nil {
				t.Error("no error")
			}
		})
	}
	var are prometheus.AlreadyRegisteredError
	if _, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "mettle", Registerer: taken}); !errors.As(err, &are) {
		t.Errorf("names taken: %v does not wrap prometheus.AlreadyRegisteredError", err)
	}
}

func TestRPC_promlint(t *testing.T) {
	reg := prometheus.NewRegistry()
	r, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "mettle", Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/some.Service/Method"}, nothing); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if len(families) != 4 {
		t.Errorf("%d families, want 4", len(families))
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func FuzzRequestMetadata(f *testing.F) {
	good, err := proto.Marshal(&repb.RequestMetadata{ToolInvocationId: "inv"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(good))
	f.Add("\x0a\xff\xff\xff\xff\x0f")
	f.Fuzz(func(t *testing.T, header string) {
		ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("build.bazel.remote.execution.v2.requestmetadata-bin", header))
		if m := metrics.RequestMetadata(ctx); m != nil && len(m.GetToolInvocationId()) > len(header) {
			t.Errorf("an invocation id of %d bytes from a header of %d", len(m.GetToolInvocationId()), len(header))
		}
	})
}

func BenchmarkRPC(b *testing.B) {
	r, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "mettle", Registerer: prometheus.NewRegistry()})
	if err != nil {
		b.Fatal(err)
	}
	info := &grpc.UnaryServerInfo{FullMethod: "/some.Service/Method"}
	b.ReportAllocs()
	for b.Loop() {
		_, _ = r.Unary(b.Context(), nil, info, nothing)
	}
}

func nothing(context.Context, any) (any, error) { return nil, nil }

// values are the samples of a registry: of histograms, the counts.
func values(t *testing.T, reg prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			k := f.GetName()
			for _, want := range []string{"code", "service", "method", "direction"} {
				for _, l := range m.GetLabel() {
					if l.GetName() == want {
						k += fmt.Sprintf(" %s=%q", want, l.GetValue())
					}
				}
			}
			got[k] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return got
}
