package nats

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/mettle/queue"
)

// A call is a kind of request to the broker, for the metrics.
type call string

const (
	callPublish    call = "publish_job"
	callFindJob    call = "find_job"
	callDeleteJob  call = "delete_job"
	callReadLease  call = "read_lease"
	callWriteLease call = "write_lease"
	callUpdate     call = "send_update"
	callNotify     call = "notify"
	callHandBack   call = "hand_back"
	callSetup      call = "setup"
)

// metrics are counted whether somebody collects them or not.
type metrics struct {
	reg      prometheus.Registerer
	seconds  *prometheus.HistogramVec
	failures *prometheus.CounterVec

	leases, redelivered, surplus, lost, lapsed, usedUp, endsLost, reconnects prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "mettle", Subsystem: "nats", Name: name, Help: help})
	}
	m := &metrics{
		reg: reg,
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "mettle", Subsystem: "nats", Name: "call_seconds",
			Help:    "How long requests to the broker take, by kind, with the times that they are tried again.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9), // to 6.5 s: Options.Timeout is 5 s
		}, []string{"call"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "mettle", Subsystem: "nats", Name: "call_failures_total",
			Help: "Requests to the broker that failed, by kind and class of the failure; a conflict or a duplicate is no trouble.",
		}, []string{"call", "class"}),
		leases:      counter("leases_total", "Jobs that were leased here."),
		redelivered: counter("redelivered_total", "Jobs that were leased here after another delivery of them had ended without their end."),
		surplus:     counter("surplus_total", "Jobs that came here when no slot waited any more, and went back."),
		lost:        counter("leases_lost_total", "Leases that a worker here still held when they had lapsed."),
		lapsed:      counter("leases_lapsed_total", "Lapsed leases, of whatever worker, that were found here."),
		usedUp:      counter("attempts_used_up_total", "Jobs that were ended here because their attempts were used up."),
		endsLost:    counter("ends_lost_total", "Jobs published here whose end did not arrive, so that the client was told to ask again."),
		reconnects:  counter("reconnects_total", "Connections to the broker after the first one."),
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
	return []prometheus.Collector{m.seconds, m.failures, m.leases, m.redelivered, m.surplus, m.lost, m.lapsed, m.usedUp, m.endsLost, m.reconnects}
}

func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all() {
		m.reg.Unregister(c)
	}
}

// observe counts a call that has ended.
func (m *metrics) observe(c call, took time.Duration, err error) {
	m.seconds.WithLabelValues(string(c)).Observe(took.Seconds())
	if err != nil {
		m.failures.WithLabelValues(string(c), class(err)).Inc()
	}
}

// class is the class of an error as the metrics have it.
func class(err error) string {
	switch {
	case errors.Is(err, errConflict):
		return "conflict"
	case errors.Is(err, errDuplicate):
		return "duplicate"
	case errors.Is(err, errNoMessage):
		return "not_found"
	case errors.Is(err, queue.ErrFull):
		return "full"
	case errors.Is(err, queue.ErrUnavailable):
		return "unavailable"
	case errors.Is(err, queue.ErrClosed), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "given_up"
	default:
		return "other"
	}
}
