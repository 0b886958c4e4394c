package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/metrics/spans"
)

const (
	// maxMethods bounds the label values that a client can make. The methods
	// of all our services are about 40; those of a handler of unknown services
	// would be whatever clients send. What is over is counted as "other".
	maxMethods = 128
	// lastCode is the last of the codes that gRPC defines. A handler can
	// return others; they are counted as UNKNOWN.
	lastCode = codes.Unauthenticated
)

var prefixPattern = regexp.MustCompile(`^[a-z][a-z0-9_]*[a-z0-9]$`)

// RPCOptions configure an RPC.
type RPCOptions struct {
	// Prefix begins the metrics' names: "mettle" gives
	// mettle_grpc_handled_total. It is required.
	Prefix string
	// Registerer takes the metrics. It is required.
	Registerer prometheus.Registerer
	// Logger takes panics, at level error, and at level debug one line a call.
	// Default: none.
	Logger *slog.Logger
}

// RPC observes the calls that a gRPC server handles: it counts and times them,
// turns a panic into an INTERNAL error, and logs. It is safe for concurrent
// use. It makes gRPC statuses of panics only; every other error passes as it is.
type RPC struct {
	log      *slog.Logger
	handled  *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	inFlight *prometheus.GaugeVec
	panics   prometheus.Counter

	methods sync.Map // full method name → *method, so that a call resolves no labels
	known   atomic.Int32

	prefix string        // of the names of calls
	calls  atomic.Uint64 // that were named
}

// method holds the metrics of one method.
type method struct {
	service, name string
	seconds       prometheus.Observer
	inFlight      prometheus.Gauge
	// codes are made when first seen: a method uses three of the seventeen.
	codes [lastCode + 1]atomic.Pointer[prometheus.Counter]
}

// NewRPC registers the metrics and returns their RPC. It fails if the prefix
// does not fit in a metric's name, or if the names are taken in the Registerer.
func NewRPC(o RPCOptions) (*RPC, error) {
	if !prefixPattern.MatchString(o.Prefix) {
		return nil, fmt.Errorf("metrics prefix %q does not match %v", o.Prefix, prefixPattern)
	}
	if o.Registerer == nil {
		return nil, errors.New("metrics of RPCs need a registerer")
	}
	r := &RPC{
		log:    o.Logger,
		prefix: newPrefix(),
		handled: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: o.Prefix, Subsystem: "grpc", Name: "handled_total",
			Help: "Calls that were answered, by the status code of the answer.",
		}, []string{"service", "method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: o.Prefix, Subsystem: "grpc", Name: "handling_seconds",
			Help: "Time from the start of a call to its answer; of streams, to their end.",
			// From the fastest unary call to an action of two hours, in few
			// enough buckets that all methods together stay near a thousand series.
			Buckets: prometheus.ExponentialBuckets(0.00025, 4, 13),
		}, []string{"service", "method"}),
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: o.Prefix, Subsystem: "grpc", Name: "in_flight_calls",
			Help: "Calls that have begun and not been answered.",
		}, []string{"service", "method"}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: o.Prefix, Subsystem: "grpc", Name: "panics_total",
			Help: "Handlers that panicked and were answered with INTERNAL.",
		}),
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	for _, c := range []prometheus.Collector{r.handled, r.seconds, r.inFlight, r.panics} {
		if err := o.Registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics of RPCs: %w", err)
		}
	}
	return r, nil
}

// ServerOptions are the interceptors as options of grpc.NewServer. Give them
// before other interceptors, so that those are observed too.
func (r *RPC) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{grpc.ChainUnaryInterceptor(r.Unary), grpc.ChainStreamInterceptor(r.Stream)}
}

// Unary is a grpc.UnaryServerInterceptor.
func (r *RPC) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
	m := r.method(info.FullMethod)
	m.inFlight.Inc()
	start := time.Now()
	ctx = r.named(ctx) //nolint:contextcheck // it is made of ctx
	defer func() {
		if v := recover(); v != nil {
			resp, err = nil, r.panicked(ctx, m, v)
		}
		code := r.done(ctx, m, start, call{err: err, req: req})
		if t := trailer(ctx, code); t != nil {
			_ = grpc.SetTrailer(ctx, t) // the client may have gone
		}
	}()
	return h(ctx, req)
}

// Stream is a grpc.StreamServerInterceptor.
func (r *RPC) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
	m := r.method(info.FullMethod)
	m.inFlight.Inc()
	start := time.Now()
	s := &observedStream{ServerStream: ss, ctx: r.named(ss.Context())}
	s.keep = r.log.Enabled(s.ctx, slog.LevelDebug)
	defer func() {
		if v := recover(); v != nil {
			err = r.panicked(s.ctx, m, v)
		}
		code := r.done(s.ctx, m, start, call{err: err, req: s.first})
		if t := trailer(s.ctx, code); t != nil {
			ss.SetTrailer(t)
		}
	}()
	return h(srv, s)
}

// observedStream has the context in which the call has a name, and keeps the first
// message where it is to be logged.
type observedStream struct {
	grpc.ServerStream
	ctx   context.Context //nolint:containedctx // that of the stream, as gRPC has it
	keep  bool
	first any
}

// Context implements grpc.ServerStream.
func (s *observedStream) Context() context.Context { return s.ctx }

// RecvMsg implements grpc.ServerStream.
func (s *observedStream) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if s.keep && err == nil {
		s.keep, s.first = false, onlyNames(m)
	}
	return err
}

// done records the end of one call, whose code it returns.
func (r *RPC) done(ctx context.Context, m *method, start time.Time, c call) codes.Code {
	c.took = time.Since(start)
	m.inFlight.Dec()
	spans.Observe(ctx, m.seconds, c.took.Seconds())
	c.code = codeOf(c.err)
	r.counter(m, c.code).Inc()
	r.logCall(ctx, m, c)
	return c.code
}

// counter is m's counter of code. Two calls may both make it: they get the
// same one.
func (r *RPC) counter(m *method, code codes.Code) prometheus.Counter {
	if c := m.codes[code].Load(); c != nil {
		return *c
	}
	c := r.handled.WithLabelValues(m.service, m.name, code.String())
	m.codes[code].Store(&c)
	return c
}

// method finds the metrics of a full method name: /package.Service/Method.
func (r *RPC) method(full string) *method {
	if m, ok := r.methods.Load(full); ok {
		return m.(*method)
	}
	if full != otherMethod && r.known.Load() >= maxMethods {
		return r.method(otherMethod)
	}
	service, name, _ := strings.Cut(strings.TrimPrefix(full, "/"), "/")
	m, there := r.methods.LoadOrStore(full, &method{
		service: service, name: name,
		seconds:  r.seconds.WithLabelValues(service, name),
		inFlight: r.inFlight.WithLabelValues(service, name),
	})
	if !there {
		r.known.Add(1)
	}
	return m.(*method)
}

// otherMethod stands for all methods beyond the first maxMethods.
const otherMethod = "/other/other"

// codeOf is the code that the gRPC server will send for err.
func codeOf(err error) codes.Code {
	s, ok := status.FromError(err)
	if !ok {
		s = status.FromContextError(err)
	}
	if s.Code() > lastCode {
		return codes.Unknown
	}
	return s.Code()
}
