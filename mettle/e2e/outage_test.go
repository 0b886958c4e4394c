package e2e_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"
)

// TestFleet_rolling replaces all that a fleet consists of in the middle of a
// build, and has each thing that it stands on go away for a while. Nothing fails,
// and no action runs twice because of it.
func TestFleet_rolling(t *testing.T) {
	c := newCity(t, func(t *testing.T) (meeting, *server) {
		t.Helper()
		// The lease of a worker that this machine keeps waiting is not to lapse.
		return overNATSWith(t, time.Minute)
	})
	l := layers{Depth: 6, Width: 30, Pause: 3, SlowPause: 50, SlowEvery: 25, LargeEvery: 20, Salt: fmt.Sprint("rolling", rand.Uint64()), Marks: c.marks} //nolint:gosec // no secret
	b := newBazel(t)
	l.write(b)
	ended := c.build(b)
	steps := []struct {
		name string
		do   func()
	}{
		{"workers drain and are replaced", func() {
			for _, w := range c.workers {
				ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
				if err := w.Terminate(ctx); err != nil {
					t.Errorf("a worker ended with %v after SIGTERM", err)
				}
				cancel()
				w.Start()
			}
		}},
		{"all API servers are killed at once", func() {
			for _, s := range c.apis {
				s.Kill()
			}
			for _, s := range c.apis {
				s.Start()
			}
		}},
		{"the broker is away", func() {
			c.broker.Kill()
			time.Sleep(cityLease / 2)
			c.broker.Start()
		}},
		{"the bucket is silent", func() {
			_ = c.bucket.cmd.Process.Signal(syscall.SIGSTOP)
			time.Sleep(cityLease / 2)
			_ = c.bucket.cmd.Process.Signal(syscall.SIGCONT)
		}},
		{"all storage is away", func() {
			for _, s := range c.elans {
				s.Kill()
			}
			time.Sleep(cityLease / 2)
			for _, s := range c.elans {
				s.Start()
			}
		}},
	}
	for i, step := range steps {
		select {
		case r := <-ended:
			t.Fatalf("the build ended before %q, step %d: %v\n%s", step.name, i, r.err, r.out)
		case <-time.After(2 * time.Second):
		}
		start := time.Now()
		step.do()
		t.Logf("%s: %.1f s", step.name, time.Since(start).Seconds())
	}
	if r := <-ended; r.err != nil {
		t.Fatalf("the build ended with %v\n%s", r.err, r.out)
	}
	l.check(b)
	marks, actions := c.executions()
	t.Logf("%d actions were executed %d times", actions, marks)
	if actions != l.Actions() || marks != actions {
		t.Errorf("%d executions of %d actions, want one each of %d", marks, actions, l.Actions())
	}
}

// TestFleet_cluster kills the broker that leads the jobs, of three, twice.
func TestFleet_cluster(t *testing.T) {
	cluster := newNATSCluster(t)
	c := newCity(t, overCluster(cluster))
	l := layers{Depth: 5, Width: 30, Pause: 3, SlowPause: 30, SlowEvery: 25, LargeEvery: 20, Salt: fmt.Sprint("cluster", rand.Uint64()), Marks: c.marks} //nolint:gosec // no secret
	b := newBazel(t)
	l.write(b)
	ended := c.build(b)
	for range 2 {
		select {
		case r := <-ended:
			t.Fatalf("the build ended too soon: %v\n%s", r.err, r.out)
		case <-time.After(3 * time.Second):
		}
		leader := cluster.leader(t.Context(), t, "city_jobs")
		leader.Kill()
		time.Sleep(2 * time.Second) // until somebody replaces it
		leader.Start()
	}
	if r := <-ended; r.err != nil {
		t.Fatalf("the build ended with %v\n%s", r.err, r.out)
	}
	l.check(b)
	marks, actions := c.executions()
	t.Logf("%d actions were executed %d times", actions, marks)
}
