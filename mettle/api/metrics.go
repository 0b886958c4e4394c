package api

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/mettle/operation"
	"github.com/mettle-build/mettle/mettle/platform"
)

// outcome is how a call ended, for the metrics.
type outcome uint8

const (
	outcomeNone        outcome = iota
	outcomeCached              // answered from the ActionCache
	outcomeExecuted            // a worker ran the action, whatever its exit code
	outcomeCancelled           // by CancelOperation
	outcomeFailed              // the action could not be run to its end
	outcomeRefused             // the client's fault: the request, the action, missing blobs
	outcomeUnavailable         // the server's fault
	outcomeLeft                // the client went away
	outcomes                   // how many there are
)

func (o outcome) String() string {
	return [...]string{"none", "cached", "executed", "cancelled", "failed", "refused", "unavailable", "left"}[o]
}

// outcomeOf tells the outcome from a response.
func outcomeOf(response []byte) outcome {
	if codeOf(response) == 0 {
		return outcomeExecuted
	}
	return outcomeFailed
}

// metrics are those of a Server. Their children are looked up once.
type metrics struct {
	inFlight prometheus.Gauge
	total    [outcomes]prometheus.Counter
	seconds  [outcomes]prometheus.Observer
}

// newMetrics makes the metrics and registers them, where there is a Registerer.
func newMetrics(r prometheus.Registerer, ops *operation.Registry, platforms *platform.Set) (*metrics, error) {
	total := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "mettle_executes_total",
		Help: "Execute, WaitExecution and WaitOperation calls that have ended, by outcome.",
	}, []string{"outcome"})
	seconds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "mettle_execute_duration_seconds",
		Help: "Time from the start of an Execute or WaitExecution call to its end, by outcome.",
		// From a cached answer to a long test.
		Buckets: prometheus.ExponentialBuckets(0.0005, 4, 12),
	}, []string{"outcome"})
	m := &metrics{inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "mettle_executes_in_flight",
		Help: "Execute and WaitExecution calls that are open.",
	})}
	for o := range outcomes {
		if o != outcomeNone {
			m.total[o] = total.WithLabelValues(o.String())
			m.seconds[o] = seconds.WithLabelValues(o.String())
		}
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{total, seconds, m.inFlight, &operations{ops: ops, desc: prometheus.NewDesc(
		"mettle_operations", "Operations in flight, by stage.", []string{"stage"}, nil)}, newPools(platforms, ops)} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// begun counts a call, until the function that it returns is called.
func (m *metrics) begun() func() {
	m.inFlight.Inc()
	return m.inFlight.Dec
}

// ended counts how a call has ended.
func (m *metrics) ended(c *call, err error, start time.Time) {
	o := c.outcome
	switch status.Code(err) {
	case codes.OK:
	case codes.Canceled, codes.DeadlineExceeded:
		o = outcomeLeft
	case codes.InvalidArgument, codes.FailedPrecondition, codes.NotFound:
		o = outcomeRefused
	default:
		o = outcomeUnavailable
	}
	if o == outcomeNone {
		return
	}
	m.total[o].Inc()
	m.seconds[o].Observe(time.Since(start).Seconds())
}

// operations collects the gauge of operations in flight.
type operations struct {
	ops  *operation.Registry
	desc *prometheus.Desc
}

// Describe implements prometheus.Collector.
func (o *operations) Describe(ch chan<- *prometheus.Desc) { ch <- o.desc }

// Collect implements prometheus.Collector.
func (o *operations) Collect(ch chan<- prometheus.Metric) {
	queued, executing := o.ops.Counts()
	ch <- prometheus.MustNewConstMetric(o.desc, prometheus.GaugeValue, float64(queued), "queued")
	ch <- prometheus.MustNewConstMetric(o.desc, prometheus.GaugeValue, float64(executing), "executing")
}
