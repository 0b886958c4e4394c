package file

import (
	"errors"
	"math"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are counted whether somebody collects them or not.
type metrics struct {
	reg                                               prometheus.Registerer
	all                                               []prometheus.Collector
	evicted, evictedBytes, corrupt, repaired, refused prometheus.Counter

	packsMoved                                         prometheus.Counter
	scrubbed, scrubbedBytes, scrubCorrupt, scrubFailed prometheus.Counter

	scrubEnded atomic.Int64 // in seconds since 1970
	// youngest and passAge are durations: for how long that which was evicted
	// had surely not been used, of all since the start, and of the last pass.
	youngest, passAge atomic.Int64
}

func newMetrics(reg prometheus.Registerer, s *Store) (*metrics, error) {
	m := &metrics{reg: reg}
	m.youngest.Store(math.MaxInt64)
	m.passAge.Store(math.MaxInt64)
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "elan", Subsystem: "file_store", Name: name, Help: help})
		m.all = append(m.all, c)
		return c
	}
	gauge := func(name, help string, value func() float64) {
		m.all = append(m.all, prometheus.NewGaugeFunc(
			prometheus.GaugeOpts{Namespace: "elan", Subsystem: "file_store", Name: name, Help: help}, value))
	}
	m.evicted = counter("evicted_total", "Files removed to make room, none within its minimal lifetime.")
	m.evictedBytes = counter("evicted_bytes_total", "Disk space of the files removed to make room.")
	m.corrupt = counter("corrupt_total", "Files found damaged and taken away.")
	m.repaired = counter("repaired_total", "Files changed from outside that were replaced by a verified copy.")
	m.refused = counter("refused_total", "Writes refused because the store is full.")
	m.scrubbed = counter("scrubbed_files_total", "Files read and verified in the background.")
	m.scrubbedBytes = counter("scrubbed_bytes_total", "Bytes read and verified in the background.")
	m.scrubCorrupt = counter("scrub_corrupt_total", "Files of which that found that they are damaged, and which were taken away.")
	m.scrubFailed = counter("scrub_failures_total", "Files and folders that could not be read to be verified.")
	gauge("scrub_last_pass_timestamp_seconds", "When all files had been verified last, in seconds since 1970. 0: never.",
		func() float64 { return float64(m.scrubEnded.Load()) })
	gauge("used_bytes", "Disk space of the store's files, in whole blocks, with what is being written.", func() float64 { return float64(s.space.state().used) })
	gauge("files", "Files of blobs and entries, about; executable twins are counted too.", func() float64 { return float64(max(s.space.state().files, 0)) })
	gauge("free_bytes", "Free disk space as last seen, less what was announced since.", func() float64 { return float64(s.space.state().free) })
	gauge("packed", "Small blobs and entries that share files.", func() float64 { return float64(s.packedRecords()) })
	gauge("packs_bytes", "Disk space of the segments in which small blobs and entries are.", func() float64 { n, _, _ := s.packsBytes(); return float64(n) })
	gauge("packs_live_bytes", "The part of packs_bytes that is not waiting to be cleaned.", func() float64 { _, n, _ := s.packsBytes(); return float64(n) })
	gauge("packs_index_bytes", "Disk space of the index of the packs.", func() float64 { _, _, n := s.packsBytes(); return float64(n) })
	m.packsMoved = counter("packs_moved_bytes_total", "Bytes of small blobs and entries that were written again so that their segments could be removed.")
	gauge("max_bytes", "Bound of used_bytes.", func() float64 { return s.space.bound() })
	gauge("min_lifetime_seconds", "For how long a file stays, at least, after its last use.", s.minLifetime.Seconds)
	gauge("youngest_evicted_age_seconds", "For how long, at least, any file evicted since the start had not been used. Below min_lifetime_seconds the lifetime contract is broken. +Inf: none was evicted.",
		func() float64 { return ageSeconds(m.youngest.Load()) })
	gauge("eviction_age_seconds", "For how long, at least, a file evicted by the last pass had not been used: what the store's size is good for. +Inf: none was evicted.",
		func() float64 { return ageSeconds(m.passAge.Load()) })
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

// ageSeconds is +Inf for the age of nothing.
func ageSeconds(age int64) float64 {
	if age == math.MaxInt64 {
		return math.Inf(1)
	}
	return time.Duration(age).Seconds()
}

// evicted counts a file of n bytes that was evicted, of which lastUse is the
// recorded one: the true one may be up to touchEvery later.
func (s *Store) evicted(n int64, lastUse time.Time) {
	m := s.metrics
	m.evicted.Inc()
	m.evictedBytes.Add(float64(n))
	age := int64(time.Since(lastUse) - s.touchEvery)
	for {
		old := m.youngest.Load()
		if age >= old || m.youngest.CompareAndSwap(old, age) {
			return
		}
	}
}

func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all {
		m.reg.Unregister(c)
	}
}
