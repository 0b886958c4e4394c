package history

import "github.com/prometheus/client_golang/prometheus"

// metrics are those of a History.
type metrics struct {
	ratio   prometheus.Histogram
	unknown prometheus.Counter
}

// newMetrics makes the metrics and registers them, where there is a Registerer.
func newMetrics(r prometheus.Registerer, h *History) (*metrics, error) {
	m := &metrics{
		ratio: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "mettle_history_time_ratio",
			Help: "How long actions ran, as a multiple of what was expected.",
			// From an eighth to eight times; 1 is in the middle of a bucket.
			Buckets: []float64{0.125, 0.25, 0.5, 0.8, 1.25, 2, 4, 8},
		}),
		unknown: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "mettle_history_unknown_total",
			Help: "Actions that ran and of which nothing was expected.",
		}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.ratio, m.unknown, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "mettle_history_keys",
		Help: "Kinds of actions whose times are remembered.",
	}, func() float64 { return float64(h.keys()) })} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// observe takes in a time and what was expected, both in seconds.
func (m *metrics) observe(took, expected float64, known bool) {
	switch {
	case !known:
		m.unknown.Inc()
	case expected > 0:
		m.ratio.Observe(took / expected)
	}
}
