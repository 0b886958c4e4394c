package api

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/mettle/operation"
	"github.com/mettle-build/mettle/mettle/platform"
)

// A Pool is what a server knows of one: of the whole fleet what workers tell, and
// of the operations its own.
type Pool struct {
	platform.Figures
	operation.Load
	// DesiredWorkers is how many workers, of as many slots as they have, it takes to
	// run all of this server's operations at once. Those of all servers add up.
	DesiredWorkers float64
	// Oldest is for how long the operation has waited that waits longest for a
	// worker, of this server's.
	Oldest time.Duration
}

// Pools lists the pools that there are. The caller owns them.
func (s *Server) Pools() []Pool { return poolsOf(s.opts.Platforms, s.ops) }

func poolsOf(platforms *platform.Set, ops *operation.Registry) []Pool {
	loads := ops.Loads()
	oldest, now := ops.OldestQueued(), time.Now()
	figures := platforms.Figures()
	out := make([]Pool, len(figures))
	for i, f := range figures {
		l := loads[f.Name]
		var waited time.Duration
		if since, ok := oldest[f.Name]; ok {
			waited = max(0, now.Sub(since))
		}
		out[i] = Pool{Oldest: waited, Figures: f, Load: l, DesiredWorkers: float64(l.Queued+l.Executing) / f.SlotsPerWorker}
	}
	return out
}

// pools collects the metrics of pools. The label pool is one of a few hundred
// names at most, which package platform sees to.
type pools struct {
	platforms *platform.Set
	ops       *operation.Registry

	operations, oldest, desired, slots, running, idle, workers *prometheus.Desc
}

func newPools(platforms *platform.Set, ops *operation.Registry) *pools {
	desc := func(name, help string, more ...string) *prometheus.Desc {
		return prometheus.NewDesc("mettle_pool_"+name, help, append([]string{"pool"}, more...), nil)
	}
	return &pools{
		platforms: platforms, ops: ops,
		operations: desc("operations", "This API server's operations in flight, by the pool whose workers they are for and stage. Add up those of all servers.", "stage"),
		oldest:     desc("oldest_queued_seconds", "For how long the one of this API server's operations has waited that waits longest for a worker of the pool; 0: none waits. Take the greatest of those of all servers."),
		desired:    desc("desired_workers", "How many workers it takes to run this API server's operations in flight at once. Add up those of all servers."),
		slots:      desc("slots", "How many actions the workers of the whole fleet can run at once. Every API server tells the same."),
		running:    desc("slots_running", "How many actions the workers of the whole fleet run. Every API server tells the same."),
		idle:       desc("slots_idle", "How many actions more the workers of the whole fleet that take jobs can run. Every API server tells the same."),
		workers:    desc("workers", "The workers of the whole fleet, by state: taking jobs, paused (by a fault of their own), draining. Every API server tells the same.", "state"),
	}
}

// Describe implements prometheus.Collector.
func (p *pools) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{p.operations, p.oldest, p.desired, p.slots, p.running, p.idle, p.workers} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (p *pools) Collect(ch chan<- prometheus.Metric) {
	for _, pool := range poolsOf(p.platforms, p.ops) {
		gauge := func(d *prometheus.Desc, v float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, append([]string{pool.Name}, labels...)...)
		}
		gauge(p.operations, float64(pool.Queued), "queued")
		gauge(p.operations, float64(pool.Executing), "executing")
		gauge(p.oldest, pool.Oldest.Seconds())
		gauge(p.desired, pool.DesiredWorkers)
		gauge(p.slots, float64(pool.Slots))
		gauge(p.running, float64(pool.Running))
		gauge(p.idle, float64(pool.Idle))
		gauge(p.workers, float64(pool.Taking), "taking")
		gauge(p.workers, float64(pool.Paused), "paused")
		gauge(p.workers, float64(pool.Draining), "draining")
	}
}
