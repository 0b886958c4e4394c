package tracing

import (
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

// TestExporter_redirect: what is for the collector, the token with it, goes to nobody
// to whom that refers.
func TestExporter_redirect(t *testing.T) {
	var other atomic.Int32
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { other.Add(1) }))
	defer elsewhere.Close()
	collector := httptest.NewServer(http.RedirectHandler(elsewhere.URL, http.StatusTemporaryRedirect))
	defer collector.Close()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	e, end, err := newExporter(t.Context(), Options{URL: collector.URL + "/v1/traces", HTTP: transport})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.ExportSpans(t.Context(), tracetest.SpanStubs{{Name: "x"}}.Snapshots()); err == nil {
		t.Error("spans are taken for sent")
	}
	if n := other.Load(); n > 0 {
		t.Errorf("the other server got %d requests", n)
	}
	if err := e.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}
