package mem

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// check holds a queue to what is always true of it, and returns the job that
// is next in the pool, found by looking at all of them.
func check(t *testing.T, q *Queue) *job {
	t.Helper()
	q.mu.Lock()
	defer q.mu.Unlock()
	p := q.pool("p")
	running, waiting := make(map[string]int), make(map[string]int)
	var next *job
	var bytes int64
	for _, j := range q.jobs {
		bytes += j.size
		switch {
		case j.lease != nil:
			running[j.lease.share.invocation]++
		case j.line == nil:
			t.Fatalf("%s neither waits nor is leased", j.msg.GetOperation())
		default:
			waiting[j.invocation]++
			if j.line.share.invocation != j.invocation || j.line.band.priority != j.priority || j.line.jobs[j.index] != j {
				t.Fatalf("%s is in a wrong line", j.msg.GetOperation())
			}
			if next == nil || sooner(j, next) {
				next = j
			}
		}
	}
	if bytes != q.bytes {
		t.Fatalf("the jobs have %d bytes, counted are %d", bytes, q.bytes)
	}
	for name, s := range p.shares {
		n := 0
		for _, l := range s.lines {
			n += len(l.jobs)
			if len(l.jobs) == 0 || l.share != s || p.byPriority[l.band.priority] != l.band || l.band.lines[l.index] != l {
				t.Fatalf("a line of %s is wrong", name)
			}
		}
		if s.running != running[name] || n != waiting[name] || s.running+n == 0 {
			t.Fatalf("%s has %d running and %d waiting, counted are %d and %d", name, running[name], waiting[name], s.running, n)
		}
		delete(running, name)
		delete(waiting, name)
	}
	if len(running)+len(waiting) > 0 {
		t.Fatalf("without a share are %v, %v", running, waiting)
	}
	if alive := len(p.idle) - p.dead; alive != 0 {
		t.Fatalf("%d consumers wait by count, want none", alive)
	}
	if len(p.bands) != len(p.byPriority) {
		t.Fatalf("%d bands, by priority %d", len(p.bands), len(p.byPriority))
	}
	return next
}

func sooner(j, k *job) bool {
	a, b := j.line.share, k.line.share
	switch {
	case j.priority != k.priority:
		return j.priority < k.priority
	case a.running != b.running:
		return a.running < b.running
	case a != b:
		return a.turn < b.turn
	case j.due != k.due:
		return j.due < k.due
	default:
		return j.seq < k.seq
	}
}

// Whatever is done to a queue, the next job is the one that the rules say, and
// the counts are right.
func TestQueue_anyOrderOfCalls(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { anyOrder(t, rand.New(rand.NewPCG(seed, 1))) }) //nolint:gosec // repeatable on purpose
	}
}

func anyOrder(t *testing.T, r *rand.Rand) {
	q, err := New(Options{MaxAttempts: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	var leases []*lease
	for step := range 600 {
		name, priority, invocation := fmt.Sprint(r.IntN(60)), r.Int32N(4)-2, fmt.Sprint(r.IntN(5))
		next := check(t, q)
		switch r.IntN(8) {
		case 0, 1, 2:
			j := &queuepb.Job{Operation: name, Pool: "p", ReplyTo: "a", Priority: priority, Invocation: invocation}
			if r.IntN(2) == 0 {
				j.Expected = durationpb.New(time.Duration(r.IntN(5)) * time.Minute)
			}
			err = q.Publish(t.Context(), j)
		case 3:
			err = q.Raise(t.Context(), name, priority, invocation)
		case 4:
			err = q.Cancel(t.Context(), name)
		case 5, 6:
			if next == nil {
				continue
			}
			l, e := q.Lease(t.Context(), []string{"p"})
			if e != nil {
				t.Fatal(e)
			}
			leases = append(leases, l.(*lease))
			if got := l.(*lease).job; got != next {
				t.Fatalf("step %d: leased %s, want %s", step, got.msg.GetOperation(), next.msg.GetOperation())
			}
		case 7:
			if len(leases) == 0 {
				continue
			}
			i := r.IntN(len(leases))
			end(t, leases[i], r.IntN(3))
			leases = slices.Delete(leases, i, i+1)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	check(t, q)
}

// end ends a lease, which may have been lost by a job that was published again.
func end(t *testing.T, l *lease, how int) {
	t.Helper()
	switch how {
	case 0:
		_ = l.Ack(t.Context())
	case 1:
		_ = l.Release(t.Context())
	default:
		_ = l.Reject(t.Context(), "no")
	}
}
