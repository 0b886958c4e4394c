//go:build linux

package persistent

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// reason is why a process has ended.
type reason string

const (
	reasonIdle    reason = "idle"
	reasonEvicted reason = "evicted"
	reasonMemory  reason = "memory"
	reasonFailed  reason = "failed"
	reasonKilled  reason = "killed"
	reasonChanged reason = "changed"
	reasonClosed  reason = "closed"
)

// Metrics are those of all pools of a worker. They are safe for concurrent use.
type Metrics struct {
	requests *prometheus.CounterVec
	ends     *prometheus.CounterVec
	live     prometheus.Gauge
}

// NewMetrics registers the metrics with r, which may be nil.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	m := newMetrics()
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.requests, m.ends, m.live} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of persistent workers: %w", err)
		}
	}
	return m, nil
}

func newMetrics() *Metrics {
	return &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mettle_worker_persistent_requests_total",
			Help: "Actions that persistent workers have answered, by process: new, reused.",
		}, []string{"process"}),
		ends: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mettle_worker_persistent_ends_total",
			Help: "Processes of persistent workers that have ended, by reason: idle, evicted (for another), memory (it was low, or there was no room for an image), failed (it ended or did not keep to the protocol), killed (timeout or cancellation), changed (its files), closed (the worker ended).",
		}, []string{"reason"}),
		live: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "mettle_worker_persistent_processes",
			Help: "Processes of persistent workers that run.",
		}),
	}
}

func (m *Metrics) started() { m.live.Inc() }

func (m *Metrics) ended(r reason) {
	m.live.Dec()
	m.ends.WithLabelValues(string(r)).Inc()
}

func (m *Metrics) answered(before int64) {
	process := "reused"
	if before == 0 {
		process = "new"
	}
	m.requests.WithLabelValues(process).Inc()
}
