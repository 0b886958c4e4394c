package relay

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are counted whether somebody collects them or not. The calls
// themselves are counted by the server's own metrics of RPCs.
type metrics struct {
	repeated, givenUp prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, r *Relay) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "elan", Subsystem: "relay", Name: name, Help: help})
	}
	m := &metrics{
		repeated: counter("repeated_total", "Storage calls made again because the storage could not be reached, or said so."),
		givenUp:  counter("given_up_total", "Storage calls that waited for the storage in vain."),
	}
	if reg == nil {
		return m, nil
	}
	waiting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "elan", Subsystem: "relay", Name: "waiting_calls", Help: "Storage calls that wait for the storage to come back.",
	}, func() float64 { return float64(r.waiting.Load()) })
	var err error
	for _, c := range []prometheus.Collector{m.repeated, m.givenUp, waiting} {
		err = errors.Join(err, reg.Register(c))
	}
	return m, err
}
