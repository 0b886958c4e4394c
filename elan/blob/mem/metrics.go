package mem

import (
	"errors"
	"math"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are counted whether somebody collects them or not.
type metrics struct {
	reg                            prometheus.Registerer
	all                            []prometheus.Collector
	evicted, evictedBytes, refused prometheus.Counter
	youngest                       atomic.Int64 // a duration: the least age of what was evicted
}

func newMetrics(reg prometheus.Registerer, s *Store) (*metrics, error) {
	m := &metrics{reg: reg}
	m.youngest.Store(math.MaxInt64)
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "elan", Subsystem: "mem_store", Name: name, Help: help})
		m.all = append(m.all, c)
		return c
	}
	gauge := func(name, help string, value func() float64) {
		m.all = append(m.all, prometheus.NewGaugeFunc(
			prometheus.GaugeOpts{Namespace: "elan", Subsystem: "mem_store", Name: name, Help: help}, value))
	}
	m.evicted = counter("evicted_total", "Blobs and entries removed to make room, none within its minimal lifetime.")
	m.evictedBytes = counter("evicted_bytes_total", "Memory of the blobs and entries removed to make room.")
	m.refused = counter("refused_total", "Writes refused because the store is full.")
	gauge("used_bytes", "Memory of blobs and entries, with what is being written.", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(s.used)
	})
	gauge("items", "Blobs and entries.", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(len(s.items))
	})
	gauge("max_bytes", "Bound of used_bytes.", func() float64 { return float64(s.max) })
	gauge("min_lifetime_seconds", "For how long a blob or an entry stays, at least, after its last use.", s.minLifetime.Seconds)
	gauge("youngest_evicted_age_seconds", "For how long, at least, anything evicted since the start had not been used. Below min_lifetime_seconds the lifetime contract is broken. +Inf: nothing was evicted.", func() float64 {
		if age := m.youngest.Load(); age < math.MaxInt64 {
			return time.Duration(age).Seconds()
		}
		return math.Inf(1)
	})
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

// evict counts an item that goes. The caller holds the store's mu.
func (m *metrics) evict(it *item, now time.Time) {
	m.evicted.Inc()
	m.evictedBytes.Add(float64(it.cost()))
	m.youngest.Store(min(m.youngest.Load(), int64(now.Sub(it.used))))
}

func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all {
		m.reg.Unregister(c)
	}
}
