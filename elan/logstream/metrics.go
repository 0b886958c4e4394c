package logstream

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are counted whether somebody collects them or not.
type metrics struct {
	created, refused prometheus.Counter
	ends             *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, s *Streams) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "elan", Subsystem: "logstreams", Name: name, Help: help})
	}
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "elan", Subsystem: "logstreams", Name: name, Help: help}, func() float64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			return f()
		})
	}
	m := &metrics{
		created: counter("created_total", "Log streams that were created."),
		refused: counter("refused_total", "Log streams that were not created for want of room."),
		ends: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "elan", Subsystem: "logstreams", Name: "ended_total",
			Help: "Log streams that have ended: finished, full where there was no room for all of it, or aborted where the writer was not heard of any more.",
		}, []string{"how"}),
	}
	if reg == nil {
		return m, nil
	}
	var err error
	for _, c := range []prometheus.Collector{
		m.created, m.refused, m.ends,
		gauge("open", "Log streams that are being written to.", func() float64 { return float64(len(s.byID) - s.ended.Len()) }),
		gauge("kept", "Log streams that have ended and can still be read.", func() float64 { return float64(s.ended.Len()) }),
		gauge("size_bytes", "The bytes of all log streams.", func() float64 { return float64(s.bytes) }),
	} {
		err = errors.Join(err, reg.Register(c))
	}
	return m, err
}

// count counts an end.
func (m *metrics) count(err error) {
	how := "finished"
	switch {
	case errors.Is(err, ErrFull):
		how = "full"
	case err != nil:
		how = "aborted"
	}
	m.ends.WithLabelValues(how).Inc()
}
