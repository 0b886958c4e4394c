package rpc

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
)

// reads counts what came of reading blobs for clients, one by one or in batches.
type reads struct{ hits, misses, failures prometheus.Counter }

func newReads(reg prometheus.Registerer) (*reads, error) {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "elan", Subsystem: "cas", Name: "reads_total",
		Help: "Blobs that clients asked for the bytes of: hit, miss where a blob was not there, or error.",
	}, []string{"result"})
	r := &reads{hits: v.WithLabelValues("hit"), misses: v.WithLabelValues("miss"), failures: v.WithLabelValues("error")}
	if reg == nil {
		return r, nil
	}
	return r, reg.Register(v) //nolint:wrapcheck // it names the metric
}

// count counts a read that began so.
func (r *reads) count(err error) {
	switch {
	case err == nil:
		r.hits.Inc()
	case errors.Is(err, blob.ErrNotFound):
		r.misses.Inc()
	default:
		r.failures.Inc()
	}
}
