//go:build linux

package worker

import (
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// workerMetrics are what an operator watches. Labels are from small closed sets.
type workerMetrics struct {
	actions *prometheus.CounterVec
	stages  *prometheus.HistogramVec
	// overhead is of all that is not the command.
	overhead prometheus.Histogram
	running  prometheus.Gauge
	taking   prometheus.Gauge
	// peak is of the memory of all processes.
	peak prometheus.Histogram
	// isolation is 1 for what keeps actions from this machine.
	isolation *prometheus.GaugeVec

	inputFetch, execution, outputUpload prometheus.Observer
}

func newMetrics(r prometheus.Registerer, isolation Isolation) (*workerMetrics, error) {
	m := &workerMetrics{
		actions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mettle_worker_actions_total",
			Help: "Jobs that ended on this worker, by outcome: success, nonzero_exit, oom and disk_quota (ended by its limit), timeout, cancelled, refused (the request was at fault), error (the worker was), lost (the lease lapsed), released (handed back), rejected (handed back by the worker's own fault).",
		}, []string{"outcome"}),
		stages: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "mettle_worker_stage_duration_seconds",
			Help:    "How long the stages of an action took: input_fetch, execution, output_upload.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 12), // 0.5 ms to 35 min
		}, []string{"stage"}),
		overhead: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "mettle_worker_overhead_seconds",
			Help:    "What an action took this worker beside its command: from the lease of the job until the slot was ready for another, without the time from the command's fork to its end.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 2, 16), // 0.1 ms to 3.3 s
		}),
		running: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "mettle_worker_actions_running",
			Help: "Jobs that this worker has leased.",
		}),
		taking: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "mettle_worker_taking_jobs",
			Help: "1 while this worker takes jobs, 0 while it does not: /readyz says why.",
		}),
	}
	m.isolation = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "mettle_worker_isolation_info",
		Help: "1 for what keeps actions from this machine: namespace (a sandbox) or bare (nothing but a user of their own, where root runs the worker).",
	}, []string{"isolation"})
	m.isolation.WithLabelValues(string(isolation)).Set(1)
	m.peak = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "mettle_worker_action_peak_memory_bytes",
		Help:    "The most memory that an action's processes had at one time, where control groups tell.",
		Buckets: prometheus.ExponentialBuckets(1<<20, 4, 9), // 1 MiB to 64 GiB
	})
	m.inputFetch = m.stages.WithLabelValues("input_fetch")
	m.execution = m.stages.WithLabelValues("execution")
	m.outputUpload = m.stages.WithLabelValues("output_upload")
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.actions, m.stages, m.overhead, m.running, m.taking, m.peak, m.isolation} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register the worker's metrics: %w", err)
		}
	}
	return m, nil
}

// observe takes the stages of an action that has run.
func (m *workerMetrics) observe(md *repb.ExecutedActionMetadata) {
	for _, s := range []struct {
		stage      prometheus.Observer
		start, end *timestamppb.Timestamp
	}{
		{m.inputFetch, md.GetInputFetchStartTimestamp(), md.GetInputFetchCompletedTimestamp()},
		{m.execution, md.GetExecutionStartTimestamp(), md.GetExecutionCompletedTimestamp()},
		{m.outputUpload, md.GetOutputUploadStartTimestamp(), md.GetOutputUploadCompletedTimestamp()},
	} {
		if s.start != nil && s.end != nil {
			s.stage.Observe(s.end.AsTime().Sub(s.start.AsTime()).Seconds())
		}
	}
}
