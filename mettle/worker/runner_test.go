//go:build linux

package worker_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// echo is a runner that takes its time, by the clock of a bubble, and prints
// the command's last argument.
type echo struct {
	took   time.Duration
	closed *int
}

func (e echo) Run(ctx context.Context, spec runner.Spec) (runner.Result, error) {
	start := time.Now()
	select {
	case <-time.After(e.took):
	case <-ctx.Done():
		return runner.Result{Start: start, End: time.Now()}, context.Cause(ctx)
	}
	out := spec.Args[len(spec.Args)-1]
	err := os.WriteFile(spec.Stdout, []byte(out), 0o600)
	return runner.Result{Start: start, End: time.Now(), StdoutBytes: int64(len(out))}, err
}

func (e echo) Close() error {
	*e.closed++
	return nil
}

// TestWorker_ownRunner is a worker that starts no process, in a bubble: all of a
// fleet can be in one.
func TestWorker_ownRunner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const took = 25 * time.Second // more than a lease
		closed := 0
		f := newFixture(t, isBare, func(o *worker.Options, q *mem.Options) {
			o.Runner = func(int) (runner.Runner, error) { return echo{took, &closed}, nil }
			o.Slots = 1
			q.LeaseTime = 15 * time.Second
		})
		t.Cleanup(func() {
			if closed != 1 {
				t.Errorf("the runner was closed %d times, want once", closed)
			}
		})
		f.start(t)
		res := f.run(t, request{script: "hello"}, 0)
		if got := string(res.GetStdoutRaw()); got != "hello" {
			t.Errorf("stdout %q, want hello", got)
		}
		m := res.GetExecutionMetadata()
		if got := m.GetExecutionCompletedTimestamp().AsTime().Sub(m.GetExecutionStartTimestamp().AsTime()); got != took {
			t.Errorf("it ran for %v, want %v", got, took)
		}
	})
}

func TestWorker_ownRunnerFails(t *testing.T) {
	f := newFixture(t, isBare, func(o *worker.Options, _ *mem.Options) {
		o.Runner = func(int) (runner.Runner, error) { return nil, errors.New("no room") }
	})
	f.start(t)
	err := <-f.ended
	if err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("Run: %v, want the runner's error", err)
	}
	f.ended <- nil
}
