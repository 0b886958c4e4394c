package creds

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// guardMetrics are what an operator watches.
type guardMetrics struct {
	refused  *prometheus.CounterVec
	failures prometheus.Counter
	loaded   prometheus.Gauge

	unaudited, auditFailures prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*guardMetrics, error) {
	m := &guardMetrics{
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "creds_refused_calls_total",
			Help: "Calls that were refused, by reason: unauthenticated, permission_denied, and the limits calls_per_second and concurrent_calls.",
		}, []string{"reason"}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "creds_policy_failures_total",
			Help: "How often the policy was read again and had mistakes, so that the last good one stayed.",
		}),
		loaded: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "creds_policy_loaded_timestamp_seconds",
			Help: "When the policy that is in force was read.",
		}),
		unaudited: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "creds_audit_left_out_total",
			Help: "Refused calls of which the audit log has no record, since there were too many.",
		}),
		auditFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "creds_audit_failures_total",
			Help: "Records that could not be written to the audit log.",
		}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.refused, m.failures, m.loaded, m.unaudited, m.auditFailures} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of credentials: %w", err)
		}
	}
	return m, nil
}
