package open

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/mettle/queue"
)

// connectable is a broker that has a connection, and knows of it without asking.
// NATS has one. Pub/Sub has none: its calls tell.
type connectable interface{ Connected() bool }

// gauged is a broker whose connection is a metric until it is closed. Failed calls
// don't tell that it is away where nobody calls: idle workers wait for what comes.
type gauged struct {
	queue.Broker

	reg   prometheus.Registerer
	gauge prometheus.Collector
}

// gauge has b's connection as a metric, if it has one and somebody collects.
func gauge(b queue.Broker, reg prometheus.Registerer) (queue.Broker, error) {
	c, ok := b.(connectable)
	if !ok || reg == nil {
		return b, nil
	}
	g := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "mettle", Subsystem: "broker", Name: "connected",
		Help: "1 while there is a connection to the broker, 0 while it is away, also before it was ever reached. Pub/Sub has none.",
	}, func() float64 {
		if c.Connected() {
			return 1
		}
		return 0
	})
	if err := reg.Register(g); err != nil {
		return nil, errors.Join(fmt.Errorf("queue: metrics: %w", err), b.Close())
	}
	return &gauged{Broker: b, reg: reg, gauge: g}, nil
}

// Close implements queue.Broker.
func (b *gauged) Close() error {
	b.reg.Unregister(b.gauge)
	return b.Broker.Close()
}
