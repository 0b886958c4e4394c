package compressed

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are counted whether somebody collects them or not.
type metrics struct {
	reg           prometheus.Registerer
	blobs         *prometheus.CounterVec
	bytes, stored prometheus.Counter
	through       *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	options := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: "elan", Subsystem: "compressed", Name: name, Help: help}
	}
	m := &metrics{
		reg:     reg,
		blobs:   prometheus.NewCounterVec(options("blobs_total", "Blobs written, by how they are kept: raw, zstd of our own, or zstd as it came."), []string{"form"}),
		bytes:   prometheus.NewCounter(options("blob_bytes_total", "Bytes of the blobs written.")),
		stored:  prometheus.NewCounter(options("stored_bytes_total", "Bytes of their containers.")),
		through: prometheus.NewCounterVec(options("reads_total", "Blobs read, by whether they were decompressed: raw, decompressed, or passed through as zstd."), []string{"way"}),
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
	return []prometheus.Collector{m.blobs, m.bytes, m.stored, m.through}
}

func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all() {
		m.reg.Unregister(c)
	}
}

// wrote counts a blob of n bytes in a container of stored bytes.
func (m *metrics) wrote(form string, n, stored int64) {
	m.blobs.WithLabelValues(form).Inc()
	m.bytes.Add(float64(n))
	m.stored.Add(float64(stored))
}
