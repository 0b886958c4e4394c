package api

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/metrics/spans"
	"github.com/mettle-build/mettle/mettle/operation"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
)

// outcome is how a call ended, for the metrics.
type outcome uint8

const (
	outcomeNone        outcome = iota
	outcomeCached              // answered from the ActionCache
	outcomeExecuted            // a worker ran the action, whatever its exit code
	outcomeCancelled           // by CancelOperation
	outcomeFailed              // the action could not be run to its end
	outcomeTimeout             // the action had run for as long as it may
	outcomeRefused             // the client's fault: the request, the action, missing blobs
	outcomeUnavailable         // the server's fault
	outcomeLeft                // the client went away
	outcomes                   // how many there are
)

func (o outcome) String() string {
	return [...]string{"none", "cached", "executed", "cancelled", "failed", "timeout", "refused", "unavailable", "left"}[o]
}

// outcomeOf tells the outcome from a response. Only what is nobody else's doing has
// failed, since an alert asks for that.
func outcomeOf(response []byte) outcome {
	switch codes.Code(codeOf(response)) { //nolint:gosec // a code that is none is a failure
	case codes.OK:
		return outcomeExecuted
	case codes.Canceled:
		return outcomeCancelled
	case codes.DeadlineExceeded:
		return outcomeTimeout
	case codes.InvalidArgument, codes.FailedPrecondition, codes.NotFound, codes.OutOfRange, codes.PermissionDenied:
		return outcomeRefused
	default:
		return outcomeFailed
	}
}

// accepted is what became of a call at the door.
type accepted uint8

const (
	acceptedCached  accepted = iota // answered from the ActionCache
	acceptedQueued                  // it has a job of its own, which the broker has or will have
	acceptedMerged                  // it waits for an operation that was there
	acceptedRefused                 // it was not taken: see refusals
	accepteds                       // how many there are
)

func (a accepted) String() string {
	return [...]string{"cached", "queued", "merged", "refused"}[a]
}

// A refusal is why an action was not taken, or not queued.
type refusal uint8

const (
	refusedInvalid   refusal = iota // the request, the Action or the Command makes no sense
	refusedMissing                  // blobs of it are not in the CAS
	refusedPlatform                 // no worker has the properties
	refusedQueueFull                // the broker has no room
	refusedBroker                   // the broker is away, for longer than was waited
	refusedStorage                  // the storage is
	refusedDraining                 // the server shuts down
	refusedElsewise                 // anything else: its client went, say
	refusals                        // how many there are
)

func (r refusal) String() string {
	return [...]string{"invalid", "missing_blobs", "no_worker", "queue_full", "broker_away", "storage_away", "draining", "other"}[r]
}

// refusalOf tells why from an error.
func refusalOf(err error) refusal {
	var missing *blob.MissingError
	switch {
	case errors.Is(err, errDraining):
		return refusedDraining
	case errors.Is(err, queue.ErrFull):
		return refusedQueueFull
	case errors.Is(err, errPublish):
		return refusedBroker
	case errors.Is(err, platform.ErrUnsupported):
		return refusedPlatform
	case errors.As(err, &missing):
		return refusedMissing
	}
	switch status.Code(toStatus(err)) {
	case codes.InvalidArgument, codes.FailedPrecondition, codes.NotFound, codes.OutOfRange:
		return refusedInvalid
	case codes.Unavailable, codes.DataLoss, codes.ResourceExhausted, codes.Internal:
		return refusedStorage
	default:
		return refusedElsewise
	}
}

// metrics are those of a Server. Their children are looked up once.
type metrics struct {
	inFlight prometheus.Gauge
	total    [outcomes]prometheus.Counter
	seconds  [outcomes]prometheus.Observer
	accepts  [accepteds]prometheus.Observer
	refused  [refusals]prometheus.Counter
	publish  prometheus.Observer
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
	accepts := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "mettle_execute_accept_seconds",
		Help: "Time from the start of an Execute call until it was cached (answered from the ActionCache), queued (the broker has its job), merged (it waits for the same action in flight) or refused.",
		// From a cached answer to a broker that is away.
		Buckets: prometheus.ExponentialBuckets(0.0001, 4, 11),
	}, []string{"how"})
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "mettle_executes_refused_total",
		Help: "Actions that were not taken, by reason: invalid, missing_blobs, no_worker (of that platform), queue_full, broker_away, storage_away, draining, other.",
	}, []string{"reason"})
	publish := prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "mettle_publish_seconds",
		Help:    "How long the broker took to take a job, each try counted.",
		Buckets: prometheus.ExponentialBuckets(0.00002, 4, 10), // from memory to its timeout
	})
	m := &metrics{publish: publish, inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "mettle_executes_in_flight",
		Help: "Execute and WaitExecution calls that are open.",
	})}
	for o := range outcomes {
		if o != outcomeNone {
			m.total[o] = total.WithLabelValues(o.String())
			m.seconds[o] = seconds.WithLabelValues(o.String())
		}
	}
	for a := range accepteds {
		m.accepts[a] = accepts.WithLabelValues(a.String())
	}
	for r := range refusals {
		m.refused[r] = refused.WithLabelValues(r.String())
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{total, seconds, m.inFlight, accepts, refused, publish, &operations{ops: ops, desc: prometheus.NewDesc(
		"mettle_operations", "Operations in flight, by stage.", []string{"stage"}, nil)}, newPools(platforms, ops)} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// accepted counts what became of a call at the door, and how long that took.
func (m *metrics) accepted(c *call, a *answer, start time.Time) {
	how := acceptedMerged
	switch {
	case a.err != nil:
		how = acceptedRefused
		m.refuse(a.err)
	case a.wait == nil:
		how = acceptedCached
	case c.ours:
		how = acceptedQueued
	}
	m.accepts[how].Observe(time.Since(start).Seconds())
}

// refuse counts an action that is not taken.
func (m *metrics) refuse(err error) { m.refused[refusalOf(err)].Inc() }

// begun counts a call, until the function that it returns is called.
func (m *metrics) begun() func() {
	m.inFlight.Inc()
	return m.inFlight.Dec
}

// ended counts how a call has ended, and tells it.
func (m *metrics) ended(ctx context.Context, c *call, err error, start time.Time) outcome {
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
	if o != outcomeNone {
		m.total[o].Inc()
		spans.Observe(ctx, m.seconds[o], time.Since(start).Seconds())
		spans.Text(trace.SpanFromContext(ctx), spans.KeyOutcome, o.String())
	}
	return o
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
