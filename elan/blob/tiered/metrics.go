package tiered

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are counted whether somebody collects them or not.
type metrics struct {
	reg     prometheus.Registerer
	reads   *prometheus.CounterVec
	fills   *prometheus.CounterVec
	corrupt *prometheus.CounterVec
	touches *prometheus.CounterVec
	joined  prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	options := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: "elan", Subsystem: "tiered", Name: name, Help: help}
	}
	m := &metrics{
		reg:     reg,
		reads:   prometheus.NewCounterVec(options("reads_total", "Reads of blobs, by the tier that had them."), []string{"tier"}),
		fills:   prometheus.NewCounterVec(options("fills_total", "Blobs put into an upper tier because they were read."), []string{"tier", "result"}),
		corrupt: prometheus.NewCounterVec(options("corrupt_total", "Copies in upper tiers that were not what their digests say, and were removed."), []string{"tier"}),
		touches: prometheus.NewCounterVec(options("touches_total", "Uses of blobs in upper tiers, by whether the authority was told."), []string{"result"}),
		joined:  prometheus.NewCounter(options("joined_reads_total", "Reads that had part in what another one was fetching already.")),
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
		return nil, err
	}
	return m, nil
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.reads, m.fills, m.corrupt, m.touches, m.joined}
}

func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all() {
		m.reg.Unregister(c)
	}
}

// fill counts a blob that was, or was not, put into an upper tier.
func (m *metrics) fill(tier string, err error) {
	result := "ok"
	if err != nil {
		result = "failed"
	}
	m.fills.WithLabelValues(tier, result).Inc()
}
