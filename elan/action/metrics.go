package action

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
)

// gets counts what came of looking results up.
type gets struct{ hits, misses, failures, dropped prometheus.Counter }

func newGets(reg prometheus.Registerer) (*gets, error) {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "elan", Subsystem: "action_cache", Name: "gets_total",
		Help: "Action results that were looked up: hit, miss where there was none that is complete, or error.",
	}, []string{"result"})
	g := &gets{
		hits: v.WithLabelValues("hit"), misses: v.WithLabelValues("miss"), failures: v.WithLabelValues("error"),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: "elan", Subsystem: "action_cache", Name: "dropped_total",
			Help: "Action results that were dropped when looked up, mostly because a blob of theirs was gone.",
		}),
	}
	if reg == nil {
		return g, nil
	}
	return g, errors.Join(reg.Register(v), reg.Register(g.dropped))
}

// count counts a lookup that ended so.
func (g *gets) count(err error) {
	switch {
	case err == nil:
		g.hits.Inc()
	case errors.Is(err, blob.ErrNotFound):
		g.misses.Inc()
	default:
		g.failures.Inc()
	}
}
