//go:build linux

package worker

import (
	"context"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/metrics/spans"
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

	// waits has how long jobs were in the queue, by their pools.
	waits                map[string]prometheus.Observer
	idle                 prometheus.Observer
	report, ack, extend  prometheus.Observer
	made, kept           prometheus.Counter // of input roots
	outputs, outputBytes prometheus.Counter
}

func newMetrics(o *Options) (*workerMetrics, error) {
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
	m.isolation.WithLabelValues(string(o.isolation())).Set(1)
	m.peak = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "mettle_worker_action_peak_memory_bytes",
		Help:    "The most memory that an action's processes had at one time, where control groups tell.",
		Buckets: prometheus.ExponentialBuckets(1<<20, 4, 9), // 1 MiB to 64 GiB
	})
	handover := m.handover(o.Pools)
	slots := prometheus.NewGauge(prometheus.GaugeOpts{Name: "mettle_worker_slots", Help: "How many actions this worker can run at once."})
	slots.Set(float64(o.Slots))
	m.inputFetch = m.stages.WithLabelValues("input_fetch")
	m.execution = m.stages.WithLabelValues("execution")
	m.outputUpload = m.stages.WithLabelValues("output_upload")
	if o.Registerer == nil {
		return m, nil
	}
	for _, c := range append(handover, m.actions, m.stages, m.overhead, m.running, slots, m.taking, m.peak, m.isolation) {
		if err := o.Registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register the worker's metrics: %w", err)
		}
	}
	return m, nil
}

// handover makes the metrics of what comes from the queue and the store, and goes there.
func (m *workerMetrics) handover(pools []string) []prometheus.Collector {
	waits := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "mettle_worker_queue_wait_seconds",
		Help:    "How long jobs had waited when this worker began with them, since their client asked, as far as the clocks of both machines agree; again for each attempt.",
		Buckets: prometheus.ExponentialBuckets(0.0005, 4, 12), // 0.5 ms to 35 min
	}, []string{"pool"})
	m.waits = make(map[string]prometheus.Observer, len(pools))
	for _, p := range pools {
		m.waits[p] = waits.WithLabelValues(p)
	}
	idle := prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "mettle_worker_lease_wait_seconds",
		Help:    "How long a slot that was free waited for a job, until it had one.",
		Buckets: prometheus.ExponentialBuckets(0.0001, 4, 12), // 0.1 ms to 7 min
	})
	calls := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "mettle_worker_queue_call_seconds",
		Help:    "How long the broker took for what this worker told it, by call: report (of a job's end), ack (of its lease), extend (a lease).",
		Buckets: prometheus.ExponentialBuckets(0.00002, 4, 10), // from memory to a timeout
	}, []string{"call"})
	entries := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "mettle_worker_input_entries_total",
		Help: "Files, directories and symlinks of the input roots of actions, by how they came there: made anew, or kept from an action before.",
	}, []string{"how"})
	outputs := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "mettle_worker_output_files_total",
		Help: "Files that actions gave as outputs, without those in directories.",
	})
	outputBytes := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "mettle_worker_output_bytes_total",
		Help: "The size of the files that actions gave as outputs, without those in directories, and of what they printed.",
	})
	m.idle, m.outputs, m.outputBytes = idle, outputs, outputBytes
	m.report, m.ack, m.extend = calls.WithLabelValues("report"), calls.WithLabelValues("ack"), calls.WithLabelValues("extend")
	m.made, m.kept = entries.WithLabelValues("made"), entries.WithLabelValues("kept")
	return []prometheus.Collector{waits, idle, calls, entries, outputs, outputBytes}
}

// leased counts a job that was in the queue, and a slot that waited for it.
func (m *workerMetrics) leased(r *run) {
	if o, ok := m.waits[r.job.GetPool()]; ok {
		o.Observe(max(0, r.waited().Seconds()))
	}
}

// collected counts the outputs of an action.
func (m *workerMetrics) collected(r *repb.ActionResult) {
	files := r.GetOutputFiles()
	bytes := r.GetStdoutDigest().GetSizeBytes() + r.GetStderrDigest().GetSizeBytes()
	for _, f := range files {
		bytes += f.GetDigest().GetSizeBytes()
	}
	m.outputs.Add(float64(len(files)))
	m.outputBytes.Add(float64(bytes))
}

// observe takes the stages of an action that has run, and what came of it. The run
// is nil where it did not get so far.
func (m *workerMetrics) observe(ctx context.Context, r *run, res *repb.ActionResult) {
	md := res.GetExecutionMetadata()
	if r != nil {
		m.collected(res)
		m.made.Add(float64(r.made))
		m.kept.Add(float64(max(0, r.entries-r.made)))
	}
	for _, s := range []struct {
		stage      prometheus.Observer
		start, end *timestamppb.Timestamp
	}{
		{m.inputFetch, md.GetInputFetchStartTimestamp(), md.GetInputFetchCompletedTimestamp()},
		{m.execution, md.GetExecutionStartTimestamp(), md.GetExecutionCompletedTimestamp()},
		{m.outputUpload, md.GetOutputUploadStartTimestamp(), md.GetOutputUploadCompletedTimestamp()},
	} {
		if s.start != nil && s.end != nil {
			spans.Observe(ctx, s.stage, s.end.AsTime().Sub(s.start.AsTime()).Seconds())
		}
	}
}
