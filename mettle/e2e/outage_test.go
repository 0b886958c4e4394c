package e2e_test

import (
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"
)

// TestFleet_rolling replaces all that a fleet consists of in the middle of a
// build, by programs of another version, and has each thing that it stands on go
// away for a while. Nothing fails, and no action runs twice because of it.
func TestFleet_rolling(t *testing.T) {
	other := otherVersion(t)
	c := newCity(t, func(t *testing.T) (meeting, *server) {
		t.Helper()
		// The lease of a worker that this machine keeps waiting is not to lapse.
		return overNATSWith(t, time.Minute)
	})
	l := layers{Depth: 6, Width: 30, Pause: 3, SlowPause: 50, SlowEvery: 25, LargeEvery: 20, Salt: fmt.Sprint("rolling", rand.Uint64()), Marks: c.marks} //nolint:gosec // no secret
	w := startWorks(c, l)
	visits := 0
	steps := []struct {
		name string
		do   func()
	}{
		{"all is upgraded, part by part", func() {
			v := startVisitor(c)
			c.upgrade(other)
			v.stop(t)
			visits = v.visits
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
	for _, step := range steps {
		w.goOn(2 * time.Second)
		start := time.Now()
		step.do()
		t.Logf("%s: %.1f s", step.name, time.Since(start).Seconds())
	}
	w.end()
	marks, actions := c.executions()
	t.Logf("%d actions were executed %d times", actions, marks)
	if want := w.Actions() + visits; actions != want || marks != actions {
		t.Errorf("%d executions of %d actions, want one each of %d", marks, actions, want)
	}
}

// TestFleet_cluster kills the broker that leads the jobs, of three, twice.
func TestFleet_cluster(t *testing.T) {
	cluster := newNATSCluster(t)
	c := newCity(t, overCluster(cluster))
	l := layers{Depth: 5, Width: 30, Pause: 3, SlowPause: 30, SlowEvery: 25, LargeEvery: 20, Salt: fmt.Sprint("cluster", rand.Uint64()), Marks: c.marks} //nolint:gosec // no secret
	w := startWorks(c, l)
	for range 2 {
		w.goOn(3 * time.Second)
		leader := cluster.leader(t.Context(), t, "city_jobs")
		leader.Kill()
		time.Sleep(2 * time.Second) // until somebody replaces it
		leader.Start()
	}
	w.end()
	marks, actions := c.executions()
	t.Logf("%d actions were executed %d times", actions, marks)
}

// works builds a package, and when that has ended while something is still to
// happen during a build, the same with another salt: how fast a machine is does not
// matter then.
type works struct {
	city   *city
	bazel  *bazel
	layers layers
	salt   string
	builds int
	ended  <-chan bazelResult
}

func startWorks(c *city, l layers) *works {
	w := &works{city: c, bazel: newBazel(c.t), layers: l, salt: l.Salt}
	w.begin()
	return w
}

func (w *works) begin() {
	w.builds++
	w.layers.Salt = fmt.Sprintf("%s-%d", w.salt, w.builds)
	w.layers.write(w.bazel)
	w.ended = w.city.build(w.bazel)
}

// goOn returns after d, while a build runs.
func (w *works) goOn(d time.Duration) {
	for {
		select {
		case r := <-w.ended:
			w.check(r)
			w.begin()
		case <-time.After(d):
			return
		}
	}
}

// end waits for the build that runs.
func (w *works) end() { w.check(<-w.ended) }

func (w *works) check(r bazelResult) {
	w.city.t.Helper()
	if r.err != nil {
		w.city.t.Fatalf("build %d ended with %v\n%s", w.builds, r.err, r.out)
	}
	w.layers.check(w.bazel)
}

// Actions is how many actions all builds together have.
func (w *works) Actions() int { return w.builds * w.layers.Actions() }
