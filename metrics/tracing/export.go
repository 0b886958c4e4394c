package tracing

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// errURL: the URL of the collector is none that we know.
var errURL = errors.New("want grpc://HOST:PORT, grpcs://HOST:PORT, or http:// or https:// with the whole path")

// CheckURL says what is wrong with the URL of a collector.
func CheckURL(s string) error {
	u, err := url.Parse(s)
	if err != nil {
		return fmt.Errorf("%w: %w", errURL, err)
	}
	switch u.Scheme {
	case "grpc", "grpcs":
		if u.Host != "" && u.Port() != "" && u.User == nil && (u.Path == "" || u.Path == "/") && u.RawQuery == "" {
			return nil
		}
	case "http", "https":
		if u.Host != "" && u.User == nil {
			return nil
		}
	}
	return errURL
}

// newExporter makes what sends, which is to be closed after it was shut down.
func newExporter(ctx context.Context, o Options) (sdk.SpanExporter, func() error, error) {
	if err := CheckURL(o.URL); err != nil {
		return nil, nil, err
	}
	u, err := url.Parse(o.URL)
	if err != nil {
		return nil, nil, err
	}
	if u.Scheme == "http" || u.Scheme == "https" {
		// The transport adds a token, which is for the collector and for nobody to whom
		// that refers.
		stay := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		client := &http.Client{Transport: o.HTTP, Timeout: sendTimeout, CheckRedirect: stay}
		e, err := otlptracehttp.New(ctx,
			otlptracehttp.WithEndpointURL(o.URL),
			otlptracehttp.WithHTTPClient(client),
			otlptracehttp.WithRetry(otlptracehttp.RetryConfig{Enabled: true, InitialInterval: firstPause, MaxInterval: lastPause, MaxElapsedTime: sendTimeout}))
		return e, func() error { client.CloseIdleConnections(); return nil }, err
	}
	dial := append([]grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}, o.Dial...)
	conn, err := grpc.NewClient(u.Host, dial...)
	if err != nil {
		return nil, nil, err
	}
	e, err := otlptracegrpc.New(ctx,
		otlptracegrpc.WithGRPCConn(conn),
		otlptracegrpc.WithRetry(otlptracegrpc.RetryConfig{Enabled: true, InitialInterval: firstPause, MaxInterval: lastPause, MaxElapsedTime: sendTimeout}))
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	return e, conn.Close, nil
}

// The pauses before a batch is sent once more.
const firstPause, lastPause = 500 * time.Millisecond, 5 * time.Second

// spansTotal counts what becomes of spans.
type spansTotal struct{ exported, failed, dropped prometheus.Counter }

func newSpansTotal(prefix string, r prometheus.Registerer) (spansTotal, error) {
	total := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: prefix, Subsystem: "trace", Name: "spans_total",
		Help: "Spans of traces by what became of them: exported; failed, since the collector was away or refused them; dropped, since too many waited for it.",
	}, []string{"outcome"})
	s := spansTotal{exported: total.WithLabelValues("exported"), failed: total.WithLabelValues("failed"), dropped: total.WithLabelValues("dropped")}
	if r == nil {
		return s, nil
	}
	return s, r.Register(total)
}

// A queue holds the spans that wait. It is a processor around the SDK's, which drops
// what is too much without a word, and an exporter around that of OTLP.
type queue struct {
	sdk.SpanProcessor // of the SDK
	exporter          sdk.SpanExporter
	log               *slog.Logger
	total             spansTotal

	max     int64
	waiting atomic.Int64
	away    atomic.Bool   // the log says so
	cut     chan struct{} // closed by cutOff
	cutOnce sync.Once
	ended   chan struct{} // closed by Shutdown, of the exporter
	endOnce sync.Once
}

func newQueue(e sdk.SpanExporter, o Options, total spansTotal) *queue {
	q := &queue{
		exporter: e, log: o.Logger, total: total, max: int64(o.Queue), cut: make(chan struct{}), ended: make(chan struct{}),
	}
	q.SpanProcessor = sdk.NewBatchSpanProcessor(
		sending{q},
		// It is never full before this one.
		sdk.WithMaxQueueSize(o.Queue),
		sdk.WithMaxExportBatchSize(min(batchSpans, o.Queue)),
		sdk.WithBatchTimeout(batchEvery),
		sdk.WithExportTimeout(sendTimeout),
	)
	return q
}

// OnEnd implements sdk.SpanProcessor.
func (q *queue) OnEnd(s sdk.ReadOnlySpan) {
	if q.waiting.Add(1) > q.max {
		q.waiting.Add(-1)
		q.total.dropped.Inc()
		return
	}
	q.SpanProcessor.OnEnd(s)
}

// cutOff has what still waits dropped, and waits for the end of the goroutine that
// sends. The processor has been told to shut down.
func (q *queue) cutOff() {
	q.cutOnce.Do(func() { close(q.cut) })
	<-q.ended
}

// sending is the side of a queue at which spans leave it.
type sending struct{ q *queue }

// ExportSpans implements sdk.SpanExporter. Its errors end here: the SDK would tell
// them to a logger of its own, again and again.
func (s sending) ExportSpans(ctx context.Context, batch []sdk.ReadOnlySpan) error {
	q := s.q
	defer q.waiting.Add(-int64(len(batch)))
	select {
	case <-q.cut:
		q.total.dropped.Add(float64(len(batch)))
		return nil
	default:
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sent := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-q.cut:
			cancel()
		case <-sent:
		}
	}()
	err := q.exporter.ExportSpans(ctx, batch)
	close(sent)
	<-watched
	if err != nil {
		q.total.failed.Add(float64(len(batch)))
		if !q.away.Swap(true) {
			q.log.Warn("traces can't be delivered; they are counted, and this is not said again until they can be", "error", err)
		}
		return nil
	}
	q.total.exported.Add(float64(len(batch)))
	if q.away.Swap(false) {
		q.log.Info("traces are delivered again")
	}
	return nil
}

// Shutdown implements sdk.SpanExporter.
func (s sending) Shutdown(ctx context.Context) error {
	var err error
	s.q.endOnce.Do(func() {
		err = s.q.exporter.Shutdown(ctx)
		close(s.q.ended)
	})
	return err
}
