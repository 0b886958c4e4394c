package tracing_test

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/metrics/logtest"
	"github.com/mettle-build/mettle/metrics/tracing"
	"github.com/mettle-build/mettle/metrics/tracing/tracingtest"
)

// watched is a tracer with its metric and its log.
type watched struct {
	*tracing.Tracer
	reg *prometheus.Registry
	log *logtest.Buffer
}

func watch(t *testing.T, o tracing.Options) watched {
	t.Helper()
	w := watched{reg: prometheus.NewPedanticRegistry(), log: &logtest.Buffer{}}
	o.Share, o.Prefix, o.Registerer, o.Logger = 1, "test", w.reg, slog.New(slog.NewTextHandler(w.log, nil))
	w.Tracer = newTracer(t, o)
	return w
}

// spans makes n of them.
func (w watched) spans(t *testing.T, n int) {
	t.Helper()
	for range n {
		_, s := w.Attempt(t.Context(), tracing.Job{})
		s.End()
	}
}

// wantTotals holds what became of the spans.
func (w watched) wantTotals(t *testing.T, exported, failed, dropped string) {
	t.Helper()
	const head = "# HELP test_trace_spans_total Spans of traces by what became of them: exported; failed, since the collector was away or refused them; dropped, since too many waited for it.\n# TYPE test_trace_spans_total counter\n"
	want := head
	for _, o := range [][2]string{{"dropped", dropped}, {"exported", exported}, {"failed", failed}} {
		want += `test_trace_spans_total{outcome="` + o[0] + `"} ` + o[1] + "\n"
	}
	if err := testutil.GatherAndCompare(w.reg, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
}

// wantLost holds that n spans, and no others, were refused or dropped.
func (w watched) wantLost(t *testing.T, n int) {
	t.Helper()
	if lost, sent := total(t, w.reg, "failed")+total(t, w.reg, "dropped"), total(t, w.reg, "exported"); int(lost) != n || sent > 0 {
		t.Errorf("%v spans were lost and %v sent, want %d and none", lost, sent, n)
	}
}

// A collector that hangs stops no call: what it can't take is dropped and counted, and
// the end does not wait for it for ever.
func TestTracer_collectorHangs(t *testing.T) {
	c := tracingtest.New(t)
	release := c.Hang()
	defer release()
	const queue = 10
	w := watch(t, tracing.Options{URL: c.URL(), Queue: queue})
	w.spans(t, queue) // a batch, which is sent
	c.Called(t, 1)
	client := serve(t, &service{}, w.Tracer, nil)
	for range 5 {
		if _, err := client.QueryWriteStatus(t.Context(), &bspb.QueryWriteStatusRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	w.wantTotals(t, "0", "0", "5") // those that are being sent count as waiting
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // as if the time for the last ones were over
	if err := w.Close(ctx); err != nil {
		t.Error(err)
	}
	w.wantLost(t, queue+5)
	w.spans(t, 1) // is none any more
	if n := strings.Count(w.log.String(), "level=WARN"); n != 1 {
		t.Errorf("%d warnings, want one: %s", n, w.log)
	}
}

// A collector that refuses, and one that is not there, is told of once, and once more
// when it is there again.
func TestTracer_collectorRefuses(t *testing.T) {
	c := tracingtest.New(t)
	c.Refuse(true)
	const queue = 4 // and so a batch
	w := watch(t, tracing.Options{URL: c.URL(), Queue: queue})
	for i := range 3 {
		w.spans(t, queue)
		c.Called(t, i+1)
		w.idle(t, queue)
	}
	c.Refuse(false)
	w.spans(t, queue)
	c.Await(t, "the spans", func(s []tracingtest.Span) bool { return len(s) == queue })
	if err := w.Close(t.Context()); err != nil {
		t.Error(err)
	}
	w.wantTotals(t, "4", "12", "0")
	log := w.log.String()
	if strings.Count(log, "level=WARN") != 1 || !strings.Contains(log, "not today") || strings.Count(log, "delivered again") != 1 {
		t.Errorf("want one warning, with the reason, and its end:\n%s", log)
	}
}

// idle waits until nothing waits to be sent, which is soon after the answer: the queue
// takes n spans then, and drops none.
func (w watched) idle(t *testing.T, n int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		got, err := testutil.GatherAndCount(w.reg)
		if err != nil || got != 3 {
			t.Fatal(got, err)
		}
		if sum := total(t, w.reg, "failed") + total(t, w.reg, "exported"); int(sum)%n == 0 && sum > 0 && !w.Waiting() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("spans wait for a minute")
		}
	}
}

func total(t *testing.T, reg *prometheus.Registry, outcome string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range families[0].GetMetric() {
		if m.GetLabel()[0].GetValue() == outcome {
			return m.GetCounter().GetValue()
		}
	}
	return 0
}

// The same by HTTP, to a server that wants a token.
func TestTracer_http(t *testing.T) {
	got := make(chan int, 1)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		req := &collectorpb.ExportTraceServiceRequest{}
		if err != nil || proto.Unmarshal(body, req) != nil || r.URL.Path != "/v1/traces" || r.Header.Get("Authorization") != "Bearer x" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		got <- len(req.GetResourceSpans()[0].GetScopeSpans()[0].GetSpans())
	}))
	defer s.Close()
	w := watch(t, tracing.Options{URL: s.URL + "/v1/traces", HTTP: withToken{&http.Transport{}}})
	w.spans(t, 3)
	if err := w.Close(t.Context()); err != nil {
		t.Error(err)
	}
	w.wantTotals(t, "3", "0", "0")
	if n := <-got; n != 3 {
		t.Errorf("%d spans, want 3", n)
	}
}

type withToken struct{ *http.Transport }

func (w withToken) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer x")
	return w.Transport.RoundTrip(r)
}

// A collector that nobody has started changes nothing.
func TestTracer_collectorAway(t *testing.T) {
	w := watch(t, tracing.Options{URL: "grpc://127.0.0.1:1"})
	client := serve(t, &service{}, w.Tracer, nil)
	if _, err := client.QueryWriteStatus(t.Context(), &bspb.QueryWriteStatusRequest{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := w.Close(ctx); err != nil {
		t.Error(err)
	}
	w.wantLost(t, 1)
}
