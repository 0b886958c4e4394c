package file

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are counted whether somebody collects them or not.
type metrics struct {
	reg                                               prometheus.Registerer
	all                                               []prometheus.Collector
	evicted, evictedBytes, corrupt, repaired, refused prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, s *Store) (*metrics, error) {
	m := &metrics{reg: reg}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "elan", Subsystem: "file_store", Name: name, Help: help})
		m.all = append(m.all, c)
		return c
	}
	gauge := func(name, help string, value func() int64) {
		m.all = append(m.all, prometheus.NewGaugeFunc(
			prometheus.GaugeOpts{Namespace: "elan", Subsystem: "file_store", Name: name, Help: help},
			func() float64 { return float64(value()) }))
	}
	m.evicted = counter("evicted_total", "Files removed to make room, none within its minimal lifetime.")
	m.evictedBytes = counter("evicted_bytes_total", "Disk space of the files removed to make room.")
	m.corrupt = counter("corrupt_total", "Files found damaged and taken away.")
	m.repaired = counter("repaired_total", "Files changed from outside that were replaced by a verified copy.")
	m.refused = counter("refused_total", "Writes refused because the store is full.")
	gauge("used_bytes", "Disk space of the store's files, in whole blocks, with what is being written.", func() int64 { return s.space.state().used })
	gauge("free_bytes", "Free disk space as last seen, less what was announced since.", func() int64 { return s.space.state().free })
	gauge("max_bytes", "Bound of used_bytes.", func() int64 { return s.space.max })
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
