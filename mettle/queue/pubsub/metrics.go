package pubsub

import (
	"context"
	"errors"
	"path"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// metrics are counted whether somebody collects them or not.
type metrics struct {
	reg   prometheus.Registerer
	calls *prometheus.CounterVec
	times *prometheus.HistogramVec

	redelivered, twice, lost, released, rejected, usedUp, dead, surplus, reconnected prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "mettle", Subsystem: "pubsub", Name: name, Help: help})
	}
	m := &metrics{
		reg: reg,
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "mettle", Subsystem: "pubsub", Name: "calls_total", Help: "Calls to Pub/Sub, by method and status code; streams once, when they are opened.",
		}, []string{"method", "code"}),
		times: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "mettle", Subsystem: "pubsub", Name: "call_seconds", Help: "How long calls to Pub/Sub took, each try counted, without streams.",
			Buckets: prometheus.ExponentialBuckets(0.001, 3, 10), // 1 ms to 20 s
		}, []string{"method"}),
		redelivered: counter("redelivered_total", "Jobs that came here after another delivery of them had lapsed or was handed back."),
		twice:       counter("delivered_twice_total", "Jobs that were delivered to this process while it had them already; they do not run again."),
		released:    counter("released_total", "Jobs that a worker here has handed back because it ends."),
		rejected:    counter("rejected_total", "Jobs that a worker here has handed back because it could not run them."),
		lost:        counter("leases_lost_total", "Leases that a worker here still held when they had lapsed."),
		usedUp:      counter("attempts_used_up_total", "Jobs that were ended here because their attempts were used up."),
		dead:        counter("dead_letters_total", "Jobs that came from the dead-letter topic, which catches what nobody ended."),
		surplus:     counter("surplus_total", "Jobs that came for a consumer that did not wait any more."),
		reconnected: counter("reconnects_total", "Streams that were opened again."),
	}
	if reg == nil {
		return m, nil
	}
	var err error
	for _, c := range m.all() {
		err = errors.Join(err, reg.Register(c))
	}
	if err != nil {
		m.unregister()
	}
	return m, err
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.calls, m.times, m.redelivered, m.twice, m.released, m.rejected, m.lost, m.usedUp, m.dead, m.surplus, m.reconnected}
}

func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all() {
		m.reg.Unregister(c)
	}
}

// unary counts and times calls.
func (m *metrics) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error { //nolint:revive // gRPC's signature
	start := time.Now()
	err := call(ctx, method, req, reply, cc, opts...)
	m.times.WithLabelValues(path.Base(method)).Observe(time.Since(start).Seconds())
	m.calls.WithLabelValues(path.Base(method), status.Code(err).String()).Inc()
	return err
}

// stream counts the streams that are opened.
func (m *metrics) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) { //nolint:revive // gRPC's signature
	s, err := open(ctx, desc, cc, method, opts...)
	m.calls.WithLabelValues(path.Base(method), status.Code(err).String()).Inc()
	return s, err
}
