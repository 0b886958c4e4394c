//go:build linux

package image

import (
	"github.com/prometheus/client_golang/prometheus"
)

type cacheMetrics struct {
	reg    prometheus.Registerer
	layers *prometheus.CounterVec
	bytes  prometheus.Counter
	used   prometheus.GaugeFunc
}

func newMetrics(reg prometheus.Registerer, used func() float64) (*cacheMetrics, error) {
	m := &cacheMetrics{
		reg: reg,
		layers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mettle_image_layers_total",
			Help: "Layers of container images: pulled, failed, or evicted from the cache.",
		}, []string{"outcome"}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "mettle_image_pulled_bytes_total",
			Help: "Bytes of layers as they came, compressed.",
		}),
		used: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "mettle_image_cache_bytes",
			Help: "Bytes of unpacked layers in the cache of container images.",
		}, used),
	}
	for _, outcome := range []string{"pulled", "failed", "evicted"} {
		m.layers.WithLabelValues(outcome)
	}
	if reg == nil {
		return m, nil
	}
	for _, col := range []prometheus.Collector{m.layers, m.bytes, m.used} {
		if err := reg.Register(col); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// close takes the gauge, which asks the cache, out of the registry.
func (m *cacheMetrics) close() error {
	if m.reg != nil {
		m.reg.Unregister(m.used)
	}
	return nil
}
