package bucket

import (
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
)

// metrics are counted whether somebody collects them or not.
type metrics struct {
	reg               prometheus.Registerer
	requests          *prometheus.CounterVec
	dropped, expiring prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, kind string) (*metrics, error) {
	options := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: "elan", Subsystem: kind + "_store", Name: name, Help: help}
	}
	m := &metrics{
		reg: reg,
		requests: prometheus.NewCounterVec(
			options("requests_total", "Attempts at requests to the bucket. A stat or a touch may be of many objects."), []string{"op", "result"}),
		dropped:  prometheus.NewCounter(options("touches_dropped_total", "Uses that were not written to the bucket because too many were waiting.")),
		expiring: prometheus.NewCounter(options("expiring_total", "Blobs found too close to their end to be counted on, and taken as missing.")),
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
	}
	return m, err
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.requests, m.dropped, m.expiring}
}

func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all() {
		m.reg.Unregister(c)
	}
}

// request counts one attempt.
func (m *metrics) request(op string, err error) {
	result := "error"
	switch {
	case err == nil:
		result = "ok"
	case errors.Is(err, blob.ErrNotFound):
		result = "absent"
	case errors.Is(err, ErrChanged):
		result = "changed"
	case transient(err):
		result = "transient"
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		result = "cancelled"
	}
	m.requests.WithLabelValues(op, result).Inc()
}
