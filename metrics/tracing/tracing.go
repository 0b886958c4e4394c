// Package tracing begins traces where calls and jobs come in, passes them on where
// calls go out, and sends them by OTLP to a collector, such as Jaeger, Tempo or the
// OpenTelemetry Collector.
//
// A call that brings a traceparent header is part of that trace, and recorded if the
// header says so. Of the others, all that have a tool_invocation_id in their
// RequestMetadata make one trace: all calls of a build, at whichever server. Its id
// is the invocation's, without the dashes, where that is a UUID, and otherwise a hash
// of it. Options.Share of them is recorded, which is decided by the id, so that a
// build is recorded whole, or not at all.
//
// What is recorded goes into a queue that is bounded, for one goroutine to send. No
// call waits for it: where a collector is slow or away, spans are dropped and counted,
// and the log says so once. With no URL in the Options nothing is made, and servers
// and connections are left as they are.
//
// A call of which nothing is recorded makes 7 small allocations more here. The
// interceptors are our own since what there is for gRPC, otelgrpc, makes 43 then, for
// it looks at each message of each stream, and knows nothing of RequestMetadata.
//
// The mains wire it; other packages use package spans.
//
//	t, err := tracing.New(ctx, tracing.Options{URL: "grpc://localhost:4317", Service: "elan", ...})
//	srv := grpc.NewServer(append(t.ServerOptions(), ...)...)
//	conn, err := grpc.NewClient(addr, append(t.DialOptions(), ...)...)
//	err = t.Close(ctx)
package tracing

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
)

const (
	// defaultQueue is what some hundred actions make, 2 KiB each.
	defaultQueue = 8 << 10
	// batchSpans are sent in one message, well below a collector's limit of 4 MiB.
	batchSpans = 512
	// batchEvery is how long a span waits for others.
	batchEvery = 2 * time.Second
	// sendTimeout bounds the sending of a batch with all its tries.
	sendTimeout = 20 * time.Second
	// scope is the name under which spans are made.
	scope = "github.com/mettle-build/mettle"
)

// Options are those of New. The zero Options make a Tracer that does nothing.
type Options struct {
	// URL is where the collector is: grpc://HOST:PORT and grpcs://HOST:PORT, or
	// http:// and https:// with the whole path, for OTLP over HTTP. "": there is none.
	URL string
	// Share of traces is recorded, from 0 to 1, where the caller does not say.
	Share float64
	// Service, Version and Instance say who sends. OTEL_SERVICE_NAME and
	// OTEL_RESOURCE_ATTRIBUTES overrule them and add to them.
	Service, Version, Instance string
	// Dial is for the connection to a collector by gRPC. Default: without TLS.
	Dial []grpc.DialOption
	// HTTP is for requests to a collector by HTTP. Default: http.DefaultTransport.
	HTTP http.RoundTripper
	// Queue is how many spans wait at most. 0: 8,192.
	Queue int
	// Prefix begins the metric's name, as in elan_trace_spans_total. Required with a
	// Registerer.
	Prefix string
	// Registerer takes the metric. nil: spans are counted for nobody.
	Registerer prometheus.Registerer
	// Logger is told when a collector goes away and returns. Default: none.
	Logger *slog.Logger
}

// A Tracer begins traces. It is safe for concurrent use.
type Tracer struct {
	share    share
	provider *sdk.TracerProvider // nil: nothing is recorded
	tracer   trace.Tracer
	queue    *queue
	close    func() error // of what the exporter sends by
}

// New makes a Tracer, which the caller closes. It connects to nobody yet. An error
// is of the Options, or of the metric.
func New(ctx context.Context, o Options) (*Tracer, error) {
	if !(o.Share >= 0 && o.Share <= 1) { // NaN is neither
		return nil, fmt.Errorf("tracing: the share %v is not between 0 and 1", o.Share)
	}
	if o.Queue < 0 {
		return nil, errors.New("tracing: the queue's length is negative")
	}
	if o.Queue == 0 {
		o.Queue = defaultQueue
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	counted, err := newSpansTotal(o.Prefix, o.Registerer)
	if err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	t := &Tracer{share: share(o.Share)}
	if o.URL == "" {
		return t, nil
	}
	exporter, closer, err := newExporter(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	who, err := describe(ctx, o)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("tracing: %w", err), closer())
	}
	t.close = closer
	t.queue = newQueue(exporter, o, counted)
	t.provider = sdk.NewTracerProvider(
		sdk.WithResource(who),
		sdk.WithSpanProcessor(t.queue),
		sdk.WithIDGenerator(ids{}),
		// Roots are begun here only where they are to be recorded.
		sdk.WithSampler(sdk.ParentBased(sdk.AlwaysSample())),
		sdk.WithRawSpanLimits(limits()),
	)
	t.tracer = t.provider.Tracer(scope)
	return t, nil
}

// describe says who sends the spans.
func describe(ctx context.Context, o Options) (*resource.Resource, error) {
	return resource.New(ctx, resource.WithTelemetrySDK(), resource.WithAttributes(
		attribute.String("service.name", o.Service),
		attribute.String("service.version", o.Version),
		attribute.String("service.instance.id", o.Instance),
	), resource.WithFromEnv())
}

// limits bound a span. The strings that come from clients are cut off before.
func limits() sdk.SpanLimits {
	l := sdk.NewSpanLimits() // what the environment says
	l.AttributeCountLimit, l.EventCountLimit, l.LinkCountLimit = 64, 16, 16
	return l
}

// On reports whether anything is recorded, so that traces are passed on.
func (t *Tracer) On() bool { return t != nil && t.provider != nil }

// closeTimeout is how long the sending of the last spans may take, when a program
// ends that others wait for.
const closeTimeout = 5 * time.Second

// Close sends what waits, for 5 seconds or until ctx is done, drops the rest, and ends.
// Spans that end later are dropped.
func (t *Tracer) Close(ctx context.Context) error {
	if !t.On() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	// Not by the provider, which ends nothing once ctx is done.
	err := t.queue.Shutdown(ctx)
	t.queue.cutOff()
	if ctx.Err() != nil {
		err = nil // what was dropped has been counted, and told
	}
	err = errors.Join(err, t.provider.Shutdown(context.WithoutCancel(ctx)))
	return errors.Join(err, t.close())
}
