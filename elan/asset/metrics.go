package asset

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are counted whether somebody collects them or not.
type metrics struct {
	reg      prometheus.Registerer
	all      []prometheus.Collector
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
}

func newMetrics(reg prometheus.Registerer, s *Service) (*metrics, error) {
	m := &metrics{
		reg: reg,
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "elan", Subsystem: "asset", Name: "requests_total",
			Help: "Requests for assets, by kind (blob or directory) and by how they ended: known without a fetch, fetched, or why not.",
		}, []string{"kind", "outcome"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "elan", Subsystem: "asset", Name: "fetch_seconds",
			Help:    "Time that requests took which led to a fetch, by kind.",
			Buckets: []float64{.05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800},
		}, []string{"kind"}),
	}
	m.all = []prometheus.Collector{
		m.requests, m.seconds,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "elan", Subsystem: "asset", Name: "fetches",
			Help: "Fetches under way, with those that wait for their turn.",
		}, func() float64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			return float64(len(s.aloft))
		}),
	}
	if reg == nil {
		return m, nil
	}
	var err error
	for _, c := range m.all {
		err = errors.Join(err, reg.Register(c))
	}
	if err != nil {
		m.unregister()
	}
	return m, err
}

func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all {
		m.reg.Unregister(c)
	}
}

// fetched counts a request.
func (m *metrics) fetched(k kind, hit bool, err error, took time.Duration) {
	m.requests.WithLabelValues(string(k), outcome(hit, err)).Inc()
	if _, ok := errors.AsType[*FetchError](err); !hit && (err == nil || ok) {
		m.seconds.WithLabelValues(string(k)).Observe(took.Seconds())
	}
}

// outcome is the label of a request.
func outcome(hit bool, err error) string {
	f, ok := errors.AsType[*FetchError](err)
	switch {
	case err == nil && hit:
		return "known"
	case err == nil:
		return "fetched"
	case ok:
		return f.Reason.String()
	case errors.Is(err, ErrInvalid):
		return "invalid"
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "left"
	}
	return "failed"
}

// String is r as metrics have it.
func (r Reason) String() string {
	switch r {
	case NotFound:
		return "not_found"
	case Denied:
		return "denied"
	case Aborted:
		return "aborted"
	case TooLarge:
		return "too_large"
	case Busy:
		return "busy"
	case TimedOut:
		return "timed_out"
	}
	return "unknown"
}
