// Package queuetest is the suite that every broker passes: what package queue
// promises, as tests. A broker's own tests call Run with a constructor and with
// what is particular to the broker; a bug that is found in one broker becomes a
// case here.
package queuetest

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Queue is all sides of a broker, as far as the suite asks for them.
type Queue interface {
	queue.Publisher
	queue.Consumer
	queue.Sender
	queue.Receiver
	queue.Notifier
	queue.Listener
}

// Features describes a broker to the suite.
type Features struct {
	// LeaseTime is the lease time of the queues that New makes.
	LeaseTime time.Duration
	// MaxAttempts is their cap on deliveries, at least 2.
	MaxAttempts int
	// Order says that jobs are leased by priority and then in the order of
	// publishing, and that one that is handed back keeps its place.
	Order bool
	// SharedDuplicates says that a job published by two API servers reports to both.
	SharedDuplicates bool
	// Raises says that a job that is published again with a lower priority number
	// while it waits is delivered by that one. A broker that is a queue.Raiser
	// does so.
	Raises bool
	// DuplicatesApart says that the broker does not know equal jobs: one that is
	// published twice is delivered twice. What is left to promise is that an API
	// server hears of one end, which is the Receiver's to see to.
	DuplicatesApart bool
	// MaxJobs is the number of jobs past which Publish fails with
	// queue.ErrFull; 0 where it is too large to test.
	MaxJobs int
	// Patience bounds each wait for something that must come. Default 10 s.
	Patience time.Duration
}

// Options say what is tested.
type Options struct {
	// New makes an empty queue and has t clean it up.
	New func(t *testing.T) Queue
	// Around runs a case; a broker without sockets runs it in a
	// synctest bubble here. Default: calls f.
	Around func(t *testing.T, f func(t *testing.T))
	Features
}

// Run runs the suite.
func Run(t *testing.T, o Options) {
	if o.Around == nil {
		o.Around = func(t *testing.T, f func(t *testing.T)) { f(t) }
	}
	if o.Patience == 0 {
		o.Patience = 10 * time.Second
	}
	for _, c := range []struct {
		name string
		test func(*testing.T, *suite)
	}{
		{"jobs/a job arrives as it was published", testArrives},
		{"jobs/a waiting consumer gets the job", testWaiting},
		{"jobs/a consumer's context ends its wait", testLeaseContext},
		{"jobs/pools are apart", testPools},
		{"jobs/by priority and order", testOrder},
		{"jobs/an equal name is the same job", testDuplicate},
		{"jobs/a more urgent publication raises the job", testPublishRaises},
		{"jobs/raised", testRaise},
		{"jobs/each goes to one of many consumers", testManyConsumers},
		{"jobs/full", testFull},
		{"jobs/no name", testNoName},
		{"leases/ack ends the job", testAck},
		{"leases/release delivers again at once", testRelease},
		{"leases/releasing does not use attempts up", testReleaseUncounted},
		{"leases/rejecting does", testReject},
		{"leases/a lapsed lease delivers again", testLapse},
		{"leases/a lost lease can do nothing", testLostLease},
		{"leases/extending keeps the job", testExtend},
		{"leases/attempts are capped", testAttempts},
		{"cancel/a waiting job is dropped", testCancelWaiting},
		{"cancel/a leased job's worker is told", testCancelLeased},
		{"cancel/a cancelled job is not delivered again", testCancelLapse},
		{"cancel/published again", testCancelThenPublish},
		{"cancel/another server is told", testCancelTells},
		{"cancel/another server is told when the worker is silent", testCancelLapseTells},
		{"cancel/another server is told when the worker hands back", testCancelReleaseTells},
		{"cancel/published again once its worker has let go", testCancelAckThenPublish},
		{"cancel/unknown", testCancelUnknown},
		{"updates/in order and to the server that asked", testUpdates},
		{"updates/a server that is gone", testUpdatesGone},
		{"updates/receiving ends with the context", testReceiveContext},
		{"updates/a slow receiver holds nobody up", testSlowReceiver},
		{"updates/a job of two servers reports to both", testSharedDuplicate},
		{"updates/a server that asks after the end hears of it", testPublishedTooLate},
		{"notices/everybody hears", testNotices},
		{"notices/nobody listens", testNoListener},
		{"notices/a listener that begins later", testLateListener},
	} {
		t.Run(c.name, func(t *testing.T) {
			o.Around(t, func(t *testing.T) { c.test(t, &suite{t: t, o: o, q: o.New(t)}) })
		})
	}
}

// A suite is one case on one queue.
type suite struct {
	t *testing.T
	o Options
	q Queue
}

// job is a job of the pool "p" that reports to "api".
func job(name string) *queuepb.Job {
	return &queuepb.Job{Operation: name, ReplyTo: "api", Pool: "p"}
}

// publish publishes jobs.
func (s *suite) publish(jobs ...*queuepb.Job) {
	s.t.Helper()
	for _, j := range jobs {
		if err := s.q.Publish(s.t.Context(), j); err != nil {
			s.t.Fatalf("publish %s: %v", j.GetOperation(), err)
		}
	}
}

// lease leases a job, which must come.
func (s *suite) lease(pools ...string) queue.Lease {
	s.t.Helper()
	if len(pools) == 0 {
		pools = []string{"p"}
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), s.o.Patience)
	defer cancel()
	l, err := s.q.Lease(ctx, pools)
	if err != nil {
		s.t.Fatalf("lease from %v: %v", pools, err)
	}
	return l
}

// leaseOf is lease of the job of that name and attempt.
func (s *suite) leaseOf(name string, attempt uint32) queue.Lease {
	s.t.Helper()
	l := s.lease()
	if l.Job().GetOperation() != name || l.Attempt() != attempt {
		s.t.Fatalf("leased %s, attempt %d, want %s, attempt %d", l.Job().GetOperation(), l.Attempt(), name, attempt)
	}
	return l
}

// noJob checks that none comes within d.
func (s *suite) noJob(d time.Duration, pools ...string) {
	s.t.Helper()
	if len(pools) == 0 {
		pools = []string{"p"}
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), d)
	defer cancel()
	if l, err := s.q.Lease(ctx, pools); err == nil {
		s.t.Fatalf("leased %s, attempt %d, want nothing", l.Job().GetOperation(), l.Attempt())
	}
}

func (s *suite) ack(l queue.Lease) {
	s.t.Helper()
	if err := l.Ack(s.t.Context()); err != nil {
		s.t.Fatalf("ack %s: %v", l.Job().GetOperation(), err)
	}
}

// receive receives the updates for id until the case ends.
func (s *suite) receive(id string) <-chan *queuepb.Update {
	ch := make(chan *queuepb.Update, 4096) // more than any case sends
	ctx, cancel := context.WithCancel(s.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.q.ReceiveUpdates(ctx, id, func(u *queuepb.Update) { ch <- u }) }()
	s.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			s.t.Errorf("receive updates for %s: %v", id, err)
		}
	})
	return ch
}

// update is the next one of ch, which must come.
func (s *suite) update(ch <-chan *queuepb.Update) *queuepb.Update {
	s.t.Helper()
	select {
	case u := <-ch:
		return u
	case <-time.After(s.o.Patience):
		s.t.Fatal("no update came")
		return nil
	}
}

func (s *suite) send(u *queuepb.Update) {
	s.t.Helper()
	if err := s.q.SendUpdate(s.t.Context(), "api", u); err != nil {
		s.t.Fatalf("send update: %v", err)
	}
}

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Errorf("%s differs (-want +got):\n%s", what, d)
	}
}

func operation(i int) string { return fmt.Sprintf("operations/%05d", i) }
