package metrics_test

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"

	"github.com/mettle-build/mettle/metrics"
)

// The index page tells how the process is, and when its certificates end.
func TestServer_index_process(t *testing.T) {
	reg := metrics.NewRegistry()
	set := func(name, use string, v float64) {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "creds_" + name, Help: "x", ConstLabels: prometheus.Labels{"use": use}})
		g.Set(v)
		reg.MustRegister(g)
	}
	now := time.Now()
	for use, end := range map[string]time.Time{"server": now.Add(10*24*time.Hour + time.Hour), "client_ca": now.Add(-time.Hour)} {
		set("certificate_not_after_timestamp_seconds", use, float64(end.Unix()))
		set("file_usable", use, 1)
	}
	set("file_usable", "policy", 0)
	set("file_modified_timestamp_seconds", "policy", 0)
	s, err := metrics.New(metrics.Options{Registry: reg, Version: "1.2.3"})
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	page := w.Body.String()
	for _, want := range []string{
		"<h2>Process</h2>", "<td>Version<td>1.2.3", "<td>Runs for<td>", "<td>Goroutines<td>",
		"<td>File for server<td>good until", ", 10 days", "<td>File for client ca<td>has ended on", "can&#39;t be used: what was read before stays. written 1970-01-01",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the index page has no %q:\n%s", want, page)
		}
	}
}

// A line of what is traced names the trace.
func TestNewLogger_trace(t *testing.T) {
	var b bytes.Buffer
	log, err := metrics.NewLogger(&b, "text", "info")
	if err != nil {
		t.Fatal(err)
	}
	for _, flags := range []trace.TraceFlags{0, trace.FlagsSampled} {
		log.InfoContext(trace.ContextWithSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{
			TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: flags,
		})), "done")
	}
	if got := strings.Count(b.String(), "trace_id=01000000000000000000000000000000"); got != 1 {
		t.Errorf("%d lines name the trace, want the one of what is recorded: %s", got, &b)
	}
}
