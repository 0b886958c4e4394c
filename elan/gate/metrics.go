package gate

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	refused                    *prometheus.CounterVec
	stalled, ended, turnedAway prometheus.Counter
	stuck, heavy               prometheus.Counter // connections
}

func newMetrics(o Options, g *Gate) (*metrics, error) {
	cut := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: o.Prefix, Subsystem: "grpc", Name: "cut_calls_total",
		Help: "Calls that were ended because their client neither sent nor took anything for too long (stalled), or because memory was short (memory), or were turned away then (turned_away).",
	}, []string{"reason"})
	m := &metrics{
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: o.Prefix, Subsystem: "grpc", Name: "refused_connections_total",
			Help: "Connections that were closed at once because there were too many, in all (total) or from their address (address).",
		}, []string{"reason"}),
		stalled: cut.WithLabelValues("stalled"), ended: cut.WithLabelValues("memory"), turnedAway: cut.WithLabelValues("turned_away"),
	}
	closed := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: o.Prefix, Subsystem: "grpc", Name: "cut_connections_total",
		Help: "Connections that were closed because their client took nothing of what it was answered for too long (stalled), or had the most that it did not take when memory was short (memory).",
	}, []string{"reason"})
	m.stuck, m.heavy = closed.WithLabelValues("stalled"), closed.WithLabelValues("memory")
	m.refused.WithLabelValues(tooMany)
	m.refused.WithLabelValues(tooManyFromAddress)
	if o.Registerer == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{
		cut, closed, m.refused,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: o.Prefix, Subsystem: "grpc", Name: "connections",
			Help: "Connections from clients that are open.",
		}, func() float64 { return float64(g.connected()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: o.Prefix, Subsystem: "grpc", Name: "memory_short",
			Help: "1 while memory is short, so that calls are ended and turned away for it; 0 otherwise.",
		}, func() float64 {
			if g.short.Load() {
				return 1
			}
			return 0
		}),
	} {
		if err := o.Registerer.Register(c); err != nil {
			return nil, fmt.Errorf("gate: %w", err)
		}
	}
	return m, nil
}
