package mem_test

import (
	"context"
	"fmt"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// of is a job of an invocation that is expected to take d; 0: nobody knows.
func of(invocation, name string, d time.Duration) *queuepb.Job {
	j := job(name)
	j.Invocation = invocation
	if d > 0 {
		j.Expected = durationpb.New(d)
	}
	return j
}

func publish(t *testing.T, q *mem.Queue, jobs ...*queuepb.Job) {
	t.Helper()
	for _, j := range jobs {
		if err := q.Publish(t.Context(), j); err != nil {
			t.Fatal(err)
		}
	}
}

func lease(t *testing.T, q *mem.Queue) queue.Lease {
	t.Helper()
	l, err := q.Lease(t.Context(), []string{"p"})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func ack(t *testing.T, l queue.Lease) {
	t.Helper()
	if err := l.Ack(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// order leases all that waits, one after the other, and tells the names.
func order(t *testing.T, q *mem.Queue) string {
	t.Helper()
	var names []string
	for waiting, _ := q.Len(); waiting > 0; waiting-- {
		l := lease(t, q)
		names = append(names, l.Job().GetOperation())
		ack(t, l)
	}
	return strings.Join(names, " ")
}

// ends runs all jobs on so many slots, each for as long as took says, and
// tells when each has ended. It runs in a bubble.
func ends(t *testing.T, q *mem.Queue, slots int, took func(*queuepb.Job) time.Duration) map[string]time.Duration {
	t.Helper()
	n, _ := q.Len()
	start := time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	type end struct {
		name string
		at   time.Duration
	}
	ended := make(chan end)
	for range slots {
		go func() {
			for {
				l, err := q.Lease(ctx, []string{"p"})
				if err != nil {
					return
				}
				time.Sleep(took(l.Job()))
				if err := l.Ack(ctx); err != nil {
					return
				}
				ended <- end{l.Job().GetOperation(), time.Since(start)}
			}
		}()
	}
	at := make(map[string]time.Duration)
	for len(at) < n {
		e := <-ended
		at[e.name] = e.at
	}
	cancel()
	return at
}

// An invocation that gives each job a priority of its own holds up nobody: of
// its priorities only some are told apart. That they come in turn stays so.
func TestPriority_oneForEachJob(t *testing.T) {
	q := newQueue(t, mem.Options{LeaseTime: time.Hour})
	const n = 20_000
	for i := range n {
		j := of("strange", fmt.Sprint("strange/", i), 0)
		j.Priority = int32((i*7919)%n) + 10 //nolint:gosec // small
		publish(t, q, j)
	}
	if bands := mem.Bands(q, "p"); bands > 100 {
		t.Errorf("the invocation's jobs wait at %d priorities, each of which is looked at when a worker comes", bands)
	}
	urgent := of("other", "urgent", 0)
	urgent.Priority = 1
	publish(t, q, urgent)
	ack(t, lease(t, q))
	sum := [2]int64{}
	for i := range n {
		l := lease(t, q)
		if l.Job() == urgent {
			t.Fatal("the urgent job came after others")
		}
		sum[2*i/n] += int64(l.Job().GetPriority())
		ack(t, l)
	}
	if sum[0] >= sum[1] {
		t.Errorf("the priorities of the first half add up to %d, of the second to %d", sum[0], sum[1])
	}
	if bands := mem.Bands(q, "p"); bands != 0 {
		t.Errorf("%d priorities are left", bands)
	}
}

func constant(d time.Duration) func(*queuepb.Job) time.Duration {
	return func(*queuepb.Job) time.Duration { return d }
}

// A small build that comes while a batch of 4,000 jobs waits has half the slots
// from then on, whatever is queued.
func TestFairness_smallBuildBesideABatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t, mem.Options{LeaseTime: time.Hour})
		for i := range 4000 {
			publish(t, q, of("batch", fmt.Sprint("batch/", i), time.Minute))
		}
		for i := range 20 {
			publish(t, q, of("build", fmt.Sprint("build/", i), time.Second))
		}
		at := ends(t, q, 8, constant(time.Second))
		var build time.Duration
		for i := range 20 {
			build = max(build, at[fmt.Sprint("build/", i)])
		}
		// 20 jobs on four of eight slots.
		if build != 5*time.Second {
			t.Errorf("the build ended after %v, want 5s", build)
		}
		if all := at["batch/3999"]; len(at) != 4020 || all > 503*time.Second {
			t.Errorf("%d jobs ended, the batch's last after %v, want 4020 and 503s", len(at), all)
		}
	})
}

// What counts is the workers that an invocation has, so jobs that take long do
// not get it more of them.
func TestFairness_longJobsDoNotCountLess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t, mem.Options{LeaseTime: time.Hour})
		for i := range 100 {
			publish(t, q, of("long", fmt.Sprint("long/", i), 0))
		}
		for i := range 1000 {
			publish(t, q, of("short", fmt.Sprint("short/", i), 0))
		}
		at := ends(t, q, 10, func(j *queuepb.Job) time.Duration {
			if j.GetInvocation() == "long" {
				return 20 * time.Second
			}
			return 2 * time.Second
		})
		var long, short int
		for name, d := range at {
			if d <= 200*time.Second {
				if strings.HasPrefix(name, "long") {
					long++
				} else {
					short++
				}
			}
		}
		// Five slots each for 200 s.
		if long != 50 || short != 500 {
			t.Errorf("in 200s %d long ones and %d short ones ended, want 50 and 500", long, short)
		}
	})
}

func TestFairness_inTurnOnOneSlot(t *testing.T) {
	q := newQueue(t, mem.Options{LeaseTime: time.Hour})
	for _, name := range []string{"a1", "a2", "a3", "b1", "b2", "c1"} {
		publish(t, q, of(name[:1], name, 0))
	}
	if got, want := order(t, q), "a1 b1 c1 a2 b2 a3"; got != want {
		t.Errorf("order is %s, want %s", got, want)
	}
}

// Invocations that come all the time, each with one job, starve none that is
// there already.
func TestFairness_newcomersDoNotStarveTheOld(t *testing.T) {
	q := newQueue(t, mem.Options{LeaseTime: time.Hour})
	publish(t, q, of("old", "old/0", 0), of("old", "old/1", 0))
	n := 0
	for i := range 10 {
		publish(t, q, of(fmt.Sprint("new-", i), fmt.Sprint("new/", i), 0), of(fmt.Sprint("newer-", i), fmt.Sprint("newer/", i), 0))
		l := lease(t, q)
		if l.Job().GetInvocation() == "old" {
			n++
		}
		ack(t, l)
	}
	if n != 2 {
		t.Errorf("of ten turns the old invocation had %d, want both of its jobs to have run", n)
	}
}

func TestPriority_isStrictAndAnyNumber(t *testing.T) {
	q := newQueue(t, mem.Options{LeaseTime: time.Hour})
	for i, p := range []int32{math.MaxInt32, 5, 0, math.MinInt32, -1, 0} {
		j := of(fmt.Sprint(i%2), fmt.Sprint(i), time.Duration(i)*time.Hour)
		j.Priority = p
		publish(t, q, j)
	}
	if got, want := order(t, q), "3 4 2 5 1 0"; got != want && got != "3 4 5 2 1 0" {
		t.Errorf("order is %s, want %s", got, want)
	}
}

// A build of 100 jobs of a second and one of a minute does not end with the long
// one, whenever it was published.
func TestExpected_longestFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t, mem.Options{LeaseTime: time.Hour})
		for i := range 240 {
			publish(t, q, of("a", fmt.Sprint("short/", i), time.Second))
		}
		time.Sleep(10 * time.Second)
		publish(t, q, of("a", "long", time.Minute))
		at := ends(t, q, 5, func(j *queuepb.Job) time.Duration { return j.GetExpected().AsDuration() })
		var last time.Duration
		for _, d := range at {
			last = max(last, d)
		}
		// 300 s of work on five slots: published last, it would end after 108 s.
		if last != time.Minute {
			t.Errorf("all ended after %v, want 1m", last)
		}
	})
}

// However many long jobs come, a short one is overtaken only by those that came
// later by less than they take longer.
func TestExpected_shortOnesAreNotStarved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t, mem.Options{LeaseTime: time.Hour})
		publish(t, q, of("a", "short", time.Second))
		for i := range 1000 {
			publish(t, q, of("a", fmt.Sprint("long/", i), time.Minute), of("a", fmt.Sprint("other/", i), time.Minute))
			l := lease(t, q)
			if l.Job().GetOperation() == "short" {
				// Two came at once and two more every 10 s, for a minute.
				if i != 12 {
					t.Errorf("the short one's turn came after %d long ones, want 12", i)
				}
				return
			}
			time.Sleep(10 * time.Second)
			ack(t, l)
		}
		t.Error("the short one's turn never came")
	})
}

func TestExpected_unknownAndNonsense(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t, mem.Options{LeaseTime: time.Hour})
		publish(t, q, of("a", "unknown", 0), of("a", "short", time.Second), of("a", "forever", math.MaxInt64), of("a", "day", 24*time.Hour))
		negative := of("a", "negative", 0)
		negative.Expected = durationpb.New(-time.Hour)
		publish(t, q, negative)
		if got, want := order(t, q), "forever day short unknown negative"; got != want {
			t.Errorf("order is %s, want %s", got, want)
		}
	})
}

func TestQueue_Raise(t *testing.T) {
	jobs := func() []*queuepb.Job {
		var js []*queuepb.Job
		for _, name := range []string{"a1", "a2", "a3", "a4", "b1"} {
			js = append(js, of(name[:1], name, 0))
		}
		return js
	}
	for label, tc := range map[string]struct {
		operation  string
		priority   int32
		invocation string
		want       string
	}{
		"nothing there":              {"x", -1, "b", "a1 b1 a2 a3 a4"},
		"as it is":                   {"a4", 0, "a", "a1 b1 a2 a3 a4"},
		"less urgent":                {"a4", 1, "c", "a1 b1 a2 a3 a4"},
		"more urgent":                {"a4", -1, "a", "a4 b1 a1 a2 a3"},
		"more urgent, of another":    {"a4", -1, "b", "a4 a1 b1 a2 a3"},
		"more urgent, and the last":  {"b1", -1, "b", "b1 a1 a2 a3 a4"},
		"of one in a shorter line":   {"a4", 0, "b", "a1 a4 a2 b1 a3"},
		"of one without a line":      {"a4", 0, "c", "a1 b1 a4 a2 a3"},
		"of one in a longer line":    {"b1", 0, "a", "a1 b1 a2 a3 a4"},
		"alone, of one without line": {"b1", 0, "c", "a1 b1 a2 a3 a4"},
	} {
		t.Run(label, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				q := newQueue(t, mem.Options{LeaseTime: time.Hour})
				publish(t, q, jobs()...)
				if err := q.Raise(t.Context(), tc.operation, tc.priority, tc.invocation); err != nil {
					t.Fatal(err)
				}
				if got := order(t, q); got != tc.want {
					t.Errorf("order is %s, want %s", got, tc.want)
				}
			})
		})
	}
}

// The few jobs of a build that a large batch wants too do not wait with the
// batch's.
func TestQueue_Raise_sharedJobs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t, mem.Options{LeaseTime: time.Hour})
		for i := range 1000 {
			publish(t, q, of("batch", fmt.Sprint(i), 0))
		}
		for i := 900; i < 910; i++ {
			if err := q.Raise(t.Context(), fmt.Sprint(i), 0, "build"); err != nil {
				t.Fatal(err)
			}
		}
		at := ends(t, q, 4, constant(time.Second))
		if at["909"] != 5*time.Second {
			t.Errorf("the last of what both want ended after %v, want 5s: ten jobs on two of four slots", at["909"])
		}
	})
}

// A worker that has a job that is raised, and hands it back, does so at the new
// priority.
func TestQueue_Raise_leased(t *testing.T) {
	q := newQueue(t, mem.Options{LeaseTime: time.Hour})
	publish(t, q, of("a", "a1", 0))
	l := lease(t, q)
	urgent := of("b", "b1", 0)
	urgent.Priority = -1
	publish(t, q, urgent)
	if err := q.Raise(t.Context(), "a1", -2, "c"); err != nil {
		t.Fatal(err)
	}
	if err := l.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, want := order(t, q), "a1 b1"; got != want {
		t.Errorf("order is %s, want %s", got, want)
	}
}

// Who waited in several pools and got a job in one gets none in the others, and
// thousands of consumers that go away leave nothing.
func TestQueue_Lease_manyWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t, mem.Options{LeaseTime: time.Hour})
		ctx, cancel := context.WithCancel(t.Context())
		got := make(chan queue.Lease, 3000)
		for range 3000 {
			go func() {
				l, _ := q.Lease(ctx, []string{"p", "other", "p"})
				got <- l
			}()
		}
		synctest.Wait()
		for i := range 1500 {
			j := job(fmt.Sprint(i))
			if i%2 == 0 {
				j.Pool = "other"
			}
			publish(t, q, j)
		}
		synctest.Wait()
		if waiting, leased := q.Len(); waiting != 0 || leased != 1500 {
			t.Errorf("%d wait, %d are leased, want 0 and 1500", waiting, leased)
		}
		cancel()
		for range 3000 {
			if l := <-got; l != nil {
				ack(t, l)
			}
		}
		publish(t, q, job("last"))
		if l := lease(t, q); l.Attempt() != 1 {
			t.Errorf("attempt %d, want 1: nobody else waits", l.Attempt())
		}
	})
}
