package bench

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// callTimeout bounds a call beyond the end of its measurement.
	callTimeout = time.Minute
	// maxErrors ends a measurement: a server that fails this often will
	// show nothing new.
	maxErrors = 100
)

// An op does one unit of a measurement. The number n is another in each call of
// a measurement. It is called from several goroutines at once.
type op func(ctx context.Context, n uint64) error

// load says how an op is repeated: by so many clients, for so long or, if that
// is sooner and maxOps is not 0, so many times. Each does one at least.
type load struct {
	clients  int
	duration time.Duration
	maxOps   uint64
	// before, where it is not nil, comes before each op, with the same number,
	// and is not measured: elapsed is then the mean over the clients of the time
	// in ops.
	before op
}

// tally is what came of a load.
type tally struct {
	lat      histogram // of the ops that succeeded
	errors   uint64
	firstErr error
	elapsed  time.Duration
	cpu      time.Duration // of this process, user and system
}

func (t *tally) merge(o *tally) {
	t.lat.merge(&o.lat)
	t.errors += o.errors
	if t.firstErr == nil {
		t.firstErr = o.firstErr
	}
	t.elapsed += o.elapsed
	t.cpu += o.cpu
}

// rate is the ops that succeeded in a second.
func (t *tally) rate() float64 {
	if t.elapsed <= 0 {
		return 0
	}
	return float64(t.lat.n) / t.elapsed.Seconds()
}

// run repeats f. It returns when all its goroutines have. The ops that are under
// way at the end are let finish. The counter seq gives the ops their numbers.
func (l load) run(caller context.Context, seq *atomic.Uint64, f op) *tally {
	ctx, cancel := context.WithTimeout(caller, l.duration+callTimeout)
	defer cancel()
	var started, failed atomic.Uint64
	tallies := make([]tally, l.clients)
	var wg sync.WaitGroup
	cpu, start := cpuTime(), time.Now()
	for i := range tallies {
		wg.Go(func() {
			t := &tallies[i]
			now := time.Now()
			// Each client does one op at least, however late its goroutine comes to run.
			for first := true; ctx.Err() == nil && (first || now.Sub(start) < l.duration) && failed.Load() < maxErrors; first = false {
				if l.maxOps > 0 && started.Add(1) > l.maxOps {
					return
				}
				then, took, err := l.once(ctx, seq.Add(1), f, now)
				now = then
				switch {
				case err == nil:
					t.lat.add(took)
				case caller.Err() != nil: // interrupted: no failure of the server's
					return
				default:
					failed.Add(1)
					t.errors++
					if t.firstErr == nil {
						t.firstErr = err
					}
				}
			}
		})
	}
	wg.Wait()
	all := &tally{}
	for i := range tallies {
		all.merge(&tallies[i])
	}
	all.elapsed, all.cpu = time.Since(start), cpuTime()-cpu
	if l.before != nil {
		all.elapsed = all.lat.sum / time.Duration(l.clients)
	}
	return all
}

// once is op n, which begins now. It returns when it ended and how long it took.
func (l load) once(ctx context.Context, n uint64, f op, now time.Time) (then time.Time, took time.Duration, err error) {
	if l.before != nil {
		if err := l.before(ctx, n); err != nil {
			return time.Now(), 0, err
		}
		now = time.Now()
	}
	err = f(ctx, n)
	then = time.Now()
	return then, then.Sub(now), err
}

// cpuTime is the CPU time that this process has used, without its children.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0 // not possible with these arguments
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// answerError is an answer that was not what it should have been.
func answerError(format string, args ...any) error {
	return fmt.Errorf("wrong answer: "+format, args...)
}
