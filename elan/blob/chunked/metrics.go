package chunked

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// What became of a Splice.
const (
	spliceKept    = "kept"    // in chunks
	spliceWhole   = "whole"   // copied from its chunks
	splicePresent = "present" // it was there
	spliceFailed  = "failed"
)

// What became of a Split.
const (
	splitKnown  = "known" // nothing was read
	splitCut    = "cut"
	splitFailed = "failed"
)

type metrics struct {
	splices, splits *prometheus.CounterVec
	madeWhole       prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	opts := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: "elan", Subsystem: "chunks", Name: name, Help: help}
	}
	m := &metrics{
		splices: prometheus.NewCounterVec(opts("splices_total",
			"Blobs that were given in chunks, by outcome: kept in chunks, copied whole from small ones, present already, failed."), []string{"outcome"}),
		splits: prometheus.NewCounterVec(opts("splits_total",
			"Blobs that were asked for in chunks, by outcome: known before, cut for it, failed."), []string{"outcome"}),
		madeWhole: prometheus.NewCounter(opts("made_whole_total", "Blobs kept in chunks that were copied whole to be linked.")),
	}
	for _, o := range []string{spliceKept, spliceWhole, splicePresent, spliceFailed} {
		m.splices.WithLabelValues(o)
	}
	for _, o := range []string{splitKnown, splitCut, splitFailed} {
		m.splits.WithLabelValues(o)
	}
	if reg == nil {
		return m, nil
	}
	return m, errors.Join(reg.Register(m.splices), reg.Register(m.splits), reg.Register(m.madeWhole))
}
