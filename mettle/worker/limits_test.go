//go:build linux

package worker_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/cgroup"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	workerpb "github.com/mettle-build/mettle/proto/worker"
)

// permitted skips a test where control groups can't be used.
func permitted(t *testing.T, cs ...cgroup.Controller) {
	t.Helper()
	tree := cgroup.Open(cgroup.Options{})
	defer tree.Close()
	for _, c := range cs {
		if err := tree.Missing(c); err != nil {
			t.Skipf("this machine does not allow it: %v", err)
		}
	}
}

const mib = 1 << 20

// usageOf is what the result's metadata tells.
func usageOf(t *testing.T, r *repb.ActionResult) (*workerpb.ResourceUsage, *workerpb.POSIXResourceUsage) {
	t.Helper()
	own, posix := &workerpb.ResourceUsage{}, &workerpb.POSIXResourceUsage{}
	found := 0
	for _, a := range r.GetExecutionMetadata().GetAuxiliaryMetadata() {
		var err error
		switch a.TypeUrl {
		case "type.googleapis.com/mettle.worker.v1.ResourceUsage":
			found, err = found+1, proto.Unmarshal(a.Value, own)
		case "type.googleapis.com/buildbarn.resourceusage.POSIXResourceUsage":
			found, err = found+1, proto.Unmarshal(a.Value, posix)
		}
		if err != nil {
			t.Error(err)
		}
	}
	if found != 2 {
		t.Errorf("%d messages about the usage, want one of each: %v", found, r.GetExecutionMetadata().GetAuxiliaryMetadata())
	}
	return own, posix
}

func TestWorker_limits(t *testing.T) {
	for _, tc := range []struct {
		name    string
		limits  runner.Limits
		needs   []cgroup.Controller
		script  string
		ended   workerpb.ResourceUsage_Ended
		message string
		outcome string
	}{
		{
			"out of memory",
			runner.Limits{MemoryBytes: 64 * mib},
			[]cgroup.Controller{cgroup.Memory},
			"ulimit -v 1000000; exec tail /dev/zero",
			workerpb.ResourceUsage_OUT_OF_MEMORY, "out of memory: this action may use 64 MiB", "oom",
		},
		{
			"a grandchild out of memory",
			runner.Limits{MemoryBytes: 64 * mib},
			[]cgroup.Controller{cgroup.Memory},
			"(ulimit -v 1000000; sh -c 'tail /dev/zero') || true; echo half > out; exit 0",
			workerpb.ResourceUsage_OUT_OF_MEMORY, "out of memory: this action may use 64 MiB", "oom",
		},
		{
			"too much on the disk",
			runner.Limits{DiskBytes: 8 * mib},
			// It goes on until it is noticed: where others free as much meanwhile, a short
			// one gives no cause to add up what it wrote.
			nil, "head -c 30000000 /dev/zero > out; sleep 60; exit 0",
			workerpb.ResourceUsage_DISK_QUOTA, "disk quota: this action wrote more than the 8 MiB that it may", "disk_quota",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			permitted(t, tc.needs...)
			registry := prometheus.NewRegistry()
			f := newFixture(t, func(o *worker.Options, _ *mem.Options) {
				o.Limits, o.Registerer, o.Slots = tc.limits, registry, 1
			}).start(t)
			job := f.publish(t, request{script: tc.script, command: &repb.Command{OutputPaths: []string{"out"}}})
			resp := f.wait(t, job)
			if resp.Status.GetCode() != 0 || resp.Result.GetExitCode() != 137 {
				t.Errorf("status %v, exit code %d, want OK and 137", resp.Status, resp.Result.GetExitCode())
			}
			if stderr := string(resp.Result.GetStderrRaw()); !strings.Contains(stderr, "mettle: "+tc.message) || !strings.Contains(resp.Message, tc.message) {
				t.Errorf("stderr %q, message %q, want %q in both", stderr, resp.Message, tc.message)
			}
			own, _ := usageOf(t, resp.Result)
			if own.Ended != tc.ended || own.MemoryLimitBytes != tc.limits.MemoryBytes || own.DiskLimitBytes != tc.limits.DiskBytes {
				t.Errorf("usage %v", own)
			}
			if r, err := f.actions.Get(t.Context(), keyOf(t, job)); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("the cache has %v, %v", r, err)
			}
			f.run(t, request{script: "echo fine; test ! -e out"}, 0)
			if got := counted(t, registry, tc.outcome); got != 1 {
				t.Errorf("%v actions have the outcome %s, want 1", got, tc.outcome)
			}
		})
	}
}

// counted is how many actions had an outcome.
func counted(t *testing.T, registry *prometheus.Registry, outcome string) float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != "mettle_worker_actions_total" {
			continue
		}
		for _, m := range family.GetMetric() {
			if m.GetLabel()[0].GetValue() == outcome {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func TestWorker_usage(t *testing.T) {
	f := newFixture(t).start(t)
	r := f.run(t, request{script: "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"}, 0)
	own, posix := usageOf(t, r)
	if own.Ended != workerpb.ResourceUsage_BY_ITSELF {
		t.Errorf("usage %v", own)
	}
	if posix.UserTime.AsDuration() <= 0 || posix.MaximumResidentSetSize < 100<<10 || posix.PageReclaims <= 0 {
		t.Errorf("usage %v", posix)
	}
}

// limited is a runner whose commands come to an end.
type limited struct {
	exitCode int
	err      func(context.Context) error
	notes    []string
}

func (l limited) Run(ctx context.Context, spec runner.Spec) (runner.Result, error) {
	err := errors.Join(os.WriteFile(spec.Stdout, nil, 0o600), os.WriteFile(spec.Stderr, nil, 0o600))
	return runner.Result{Start: time.Now(), End: time.Now(), ExitCode: l.exitCode, Notes: l.notes}, errors.Join(err, l.err(ctx))
}

func (limited) Close() error { return nil }

func TestWorker_endings(t *testing.T) {
	for _, tc := range []struct {
		name     string
		run      limited
		code     int32
		exitCode int32
		message  string
	}{
		{
			"out of memory and ended with 0",
			limited{err: func(context.Context) error { return fmt.Errorf("%w: of 5 bytes", runner.ErrOutOfMemory) }},
			0, 137, "of 5 bytes",
		},
		{
			// What ended it is the timeout; what may have held it up is told as well.
			"out of memory, and then the timeout",
			limited{137, func(ctx context.Context) error {
				<-ctx.Done()
				return fmt.Errorf("killed: %w", context.Cause(ctx))
			}, []string{"out of memory: a process of it was killed"}},
			4, 137, "a process of it was killed",
		},
		{
			"forks were refused",
			limited{2, func(context.Context) error { return nil }, []string{"3 times no process could be started"}},
			0, 2, "no process could be started",
		},
		{
			// The action is not at fault, and another machine may have more.
			"the machine is out of memory",
			limited{137, func(context.Context) error { return errors.New("the worker's machine ran out of memory") }, nil},
			14, 0, "", // of no account: the job goes back
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			registry := prometheus.NewRegistry()
			f := newFixture(t, isBare, func(o *worker.Options, q *mem.Options) {
				o.Registerer = registry
				o.Runner = func(int) (runner.Runner, error) { return tc.run, nil }
				o.DefaultTimeout = 300 * time.Millisecond
				q.MaxAttempts = 1
			}).start(t)
			job := f.publish(t, request{script: "x"})
			if tc.code == 14 {
				waitFor(t, func() bool { return counted(t, registry, "rejected") == 1 })
				return
			}
			resp := f.wait(t, job)
			if resp.Status.GetCode() != tc.code || resp.Result.GetExitCode() != tc.exitCode || !strings.Contains(resp.Message, tc.message) {
				t.Errorf("status %v, exit code %d, message %q; want %d, %d, %q", resp.Status, resp.Result.GetExitCode(), resp.Message, tc.code, tc.exitCode, tc.message)
			}
		})
	}
}

func TestNew_limitsThatCannotBe(t *testing.T) {
	for name, l := range map[string]runner.Limits{
		"negative memory": {MemoryBytes: -1}, "negative CPUs": {CPUs: -1}, "negative disk": {DiskBytes: -1},
		"a page of memory": {MemoryBytes: 4096}, "one process": {Processes: 1},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.Limits = l })
			if w, err := worker.New(f.opts); err == nil {
				t.Errorf("New succeeded: %v", w.Close())
			}
		})
	}
	t.Run("not permitted", func(t *testing.T) {
		tree := cgroup.Open(cgroup.Options{})
		defer tree.Close()
		if tree.Missing(cgroup.Memory) == nil {
			t.Skip("this machine permits it")
		}
		f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.Limits.MemoryBytes = 1 << 30 })
		w, err := worker.New(f.opts)
		if err == nil {
			t.Fatalf("New succeeded: %v", w.Close())
		}
		if !errors.Is(err, cgroup.ErrMissing) || !strings.Contains(err.Error(), "Delegate=yes") {
			t.Errorf("New: %v, want what is missing and what to do", err)
		}
	})
}

func TestMetrics_peakMemory(t *testing.T) {
	permitted(t, cgroup.Memory)
	registry := prometheus.NewRegistry()
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.Registerer = registry }).start(t)
	f.run(t, request{script: "true"}, 0)
	if n, err := testutil.GatherAndCount(registry, "mettle_worker_action_peak_memory_bytes"); err != nil || n != 1 {
		t.Errorf("%d histograms, %v", n, err)
	}
}
