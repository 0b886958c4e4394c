//go:build linux

package worker_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestWorker_cancelled(t *testing.T) {
	f := newFixture(t).start(t)
	job := f.publish(t, request{script: "(setsid sleep 1000 &); touch $PWD/up; sleep 1000"})
	f.waitRunning(t)
	if err := f.queue.Cancel(t.Context(), job.Operation); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		waiting, leased := f.queue.Len()
		return waiting+leased == 0 && f.marker() == ""
	})
	f.wantNoProcesses(t)
	f.run(t, request{script: "true"}, 0)
}

// Two API servers publish the same action, each under a name of its own: the
// second job, which had to wait, is answered with the result of the first.
func TestWorker_jobsOfTwoServers(t *testing.T) {
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.Slots = 1 })
	first := f.makeJob(t, request{script: "touch up; until [ -e go ]; do sleep 0.01; done; echo done"})
	second := proto.CloneOf(first)
	second.Operation = "another operation"
	second.Queued = timestamppb.New(time.Now().Add(-time.Hour)) // as if the first ran for that long
	f.start(t)
	for _, j := range []*queuepb.Job{first, second} {
		if err := f.queue.Publish(t.Context(), j); err != nil {
			t.Fatal(err)
		}
	}
	f.waitRunning(t)
	if err := os.WriteFile(strings.TrimSuffix(f.marker(), "up")+"go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	one, two := f.wait(t, first), f.wait(t, second)
	if one.CachedResult || !two.CachedResult {
		t.Errorf("cached_result is %v of the first and %v of the second", one.CachedResult, two.CachedResult)
	}
	if a, b := one.Result.GetExecutionMetadata(), two.Result.GetExecutionMetadata(); !proto.Equal(a.GetExecutionStartTimestamp(), b.GetExecutionStartTimestamp()) {
		t.Errorf("it ran at %v and at %v", a.GetExecutionStartTimestamp(), b.GetExecutionStartTimestamp())
	}
}

func TestWorker_drains(t *testing.T) {
	f := newFixture(t)
	w, err := worker.New(f.opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	job := f.publish(t, request{script: "touch up; until [ -e go ]; do sleep 0.01; done"})
	f.waitRunning(t)
	if err := w.Ready(); err != nil {
		t.Errorf("Ready: %v", err)
	}
	cancel()
	waiting := f.publish(t, request{script: "true"})
	select {
	case err := <-ended:
		t.Fatalf("Run ended with an action running: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := os.WriteFile(strings.TrimSuffix(f.marker(), "up")+"go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
	if _, err := f.actions.Get(t.Context(), keyOf(t, job)); err != nil {
		t.Errorf("the result of the running action: %v", err)
	}
	if n, leased := f.queue.Len(); n != 1 || leased != 0 {
		t.Errorf("%d jobs wait, %d are leased, want %s to wait", n, leased, waiting.Operation)
	}
	if w.Ready() == nil {
		t.Error("Ready after the end")
	}
	if err := w.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(f.dir, "slot*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestWorker_Abort(t *testing.T) {
	f := newFixture(t)
	w, err := worker.New(f.opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	f.publish(t, request{script: "touch up; sleep 1000"})
	f.waitRunning(t)
	cancel()
	w.Abort()
	w.Abort()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
	if waiting, leased := f.queue.Len(); waiting != 1 || leased != 0 {
		t.Errorf("%d jobs wait, %d are leased, want the job back in the queue", waiting, leased)
	}
	if err := w.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	f.wantNoProcesses(t)
}

// mutes is a broker that does not answer who extends a lease.
type mutes struct {
	queue.Consumer
	asked chan struct{}
}

type mute struct {
	queue.Lease
	asked chan struct{}
}

func (m mutes) Lease(ctx context.Context, pools []string) (queue.Lease, error) {
	l, err := m.Consumer.Lease(ctx, pools)
	if err != nil {
		return nil, err
	}
	return mute{l, m.asked}, nil
}

func (m mute) Extend(ctx context.Context) error {
	select {
	case m.asked <- struct{}{}:
	default:
	}
	<-ctx.Done()
	return ctx.Err()
}

// What is to end a job does not wait for a broker that says nothing.
func TestWorker_Abort_whileTheBrokerIsSilent(t *testing.T) {
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.LeaseExtendEvery = time.Millisecond })
	asked := make(chan struct{}, 1)
	f.opts.Jobs = mutes{f.queue, asked}
	f.start(t)
	f.publish(t, request{script: "touch up; sleep 1000"})
	f.waitRunning(t)
	<-asked
	f.worker.Abort() // and nothing else
	select {
	case err := <-f.ended:
		if err != nil {
			t.Errorf("Run: %v", err)
		}
		f.ended <- err
	case <-time.After(20 * time.Second): // a report may take half a minute
		t.Fatal("the worker does not end")
	}
	if waiting, leased := f.queue.Len(); waiting != 1 || leased != 0 {
		t.Errorf("%d jobs wait, %d are leased, want the job back in the queue", waiting, leased)
	}
}

func TestNew_oneDirectoryOneWorker(t *testing.T) {
	f := newFixture(t).start(t)
	if _, err := worker.New(f.opts); err == nil || !strings.Contains(err.Error(), "another worker uses it") {
		t.Errorf("New: %v, want it refused", err)
	}
}

// A worker that was killed leaves its directory as it was.
func TestNew_cleansUp(t *testing.T) {
	f := newFixture(t)
	old := filepath.Join(f.dir, "slot7", "root", "a")
	if err := os.MkdirAll(old, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(old, 0); err != nil {
		t.Fatal(err)
	}
	f.start(t)
	if _, err := os.Stat(filepath.Join(f.dir, "slot7")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("slot7 is still there: %v", err)
	}
}

func TestWorker_waitsForDisk(t *testing.T) {
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.MinFreeDiskBytes = 1 << 60 }).start(t)
	f.publish(t, request{script: "true"})
	waitFor(t, func() bool {
		err := f.worker.Ready()
		return err != nil && strings.Contains(err.Error(), "less than the limit")
	})
	if waiting, leased := f.queue.Len(); waiting != 1 || leased != 0 {
		t.Errorf("%d jobs wait, %d are leased, want it to wait", waiting, leased)
	}
}

func TestWorker_metrics(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.Registerer = registry }).start(t)
	f.run(t, request{
		script: "cp in out; cp in out2", command: &repb.Command{OutputPaths: []string{"out", "out2"}},
		root: &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: f.put(t, "input")}}},
	}, 0)
	f.run(t, request{script: "false"}, 1)
	waitFor(t, func() bool { return acknowledged(t, registry) == 2 }) // what is counted last
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v %v", problems, err)
	}
	counts := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			counts[f.GetName()+labels(m)] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	for name, want := range map[string]float64{
		"mettle_worker_actions_total success":                1,
		"mettle_worker_actions_total nonzero_exit":           1,
		"mettle_worker_stage_duration_seconds execution":     2,
		"mettle_worker_stage_duration_seconds input_fetch":   2,
		"mettle_worker_stage_duration_seconds output_upload": 2,
		"mettle_worker_queue_wait_seconds default":           2,
		"mettle_worker_lease_wait_seconds":                   2,
		"mettle_worker_queue_call_seconds report":            2,
		"mettle_worker_queue_call_seconds ack":               2,
		"mettle_worker_input_entries_total made":             1,
		"mettle_worker_output_files_total":                   2,
		"mettle_worker_output_bytes_total":                   10,
		"mettle_worker_slots":                                2,
	} {
		if counts[name] != want {
			t.Errorf("%s is %v, want %v", name, counts[name], want)
		}
	}
}

// acknowledged is how many jobs the worker has acknowledged.
func acknowledged(t *testing.T, r prometheus.Gatherer) (n uint64) {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName()+labels(m) == "mettle_worker_queue_call_seconds ack" {
				n += m.GetHistogram().GetSampleCount()
			}
		}
	}
	return n
}

func labels(m *dto.Metric) (s string) {
	for _, l := range m.Label {
		s += " " + l.GetValue()
	}
	return s
}

func TestOne(t *testing.T) {
	f := newFixture(t)
	job := f.makeJob(t, request{script: "cat in; echo made > made; exit 4", root: &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: f.put(t, "input")}}}})
	resp, root, err := worker.One(t.Context(), worker.Options{Store: f.store, Dir: f.dir, UIDBase: testUIDBase}, job)
	if err != nil {
		t.Fatal(err)
	}
	if resp.Result.ExitCode != 4 || string(resp.Result.StdoutRaw) != "input" {
		t.Errorf("response %v", resp)
	}
	for name, want := range map[string]string{"in": "input", "made": "made\n", "../stdout": "input"} {
		if data, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(data) != want {
			t.Errorf("%s is %q, %v, want %q", name, data, err, want)
		}
	}
}
