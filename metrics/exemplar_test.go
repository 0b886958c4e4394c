package metrics_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/metrics"
)

// The time of a call that is traced leads to its trace, for those who ask for
// OpenMetrics; to others, it is one of many.
func TestServer_exemplars(t *testing.T) {
	reg := prometheus.NewRegistry()
	r, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "mettle", Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	ctx := trace.ContextWithSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{0xab}, SpanID: trace.SpanID{1}, TraceFlags: trace.FlagsSampled,
	}))
	if _, err := r.Unary(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/s/m"}, func(context.Context, any) (any, error) { return nil, nil }); err != nil { //nolint:nilnil // an answer like others
		t.Fatal(err)
	}
	s, err := metrics.New(metrics.Options{Registry: reg})
	if err != nil {
		t.Fatal(err)
	}
	const exemplar = `# {trace_id="ab000000000000000000000000000000"}`
	for accept, want := range map[string]bool{"application/openmetrics-text; version=1.0.0": true, "text/plain": false} {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil)
		req.Header.Set("Accept", accept)
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, req)
		body := w.Body.String()
		if strings.Contains(body, exemplar) != want || strings.HasSuffix(body, "# EOF\n") != want || !strings.Contains(body, "mettle_grpc_handling_seconds_bucket") {
			t.Errorf("to %s, exemplars %v, want %v:\n%s", accept, !want, want, body)
		}
	}
}
