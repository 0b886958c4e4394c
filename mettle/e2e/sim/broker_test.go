//go:build linux

package sim_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A broker is the state that a broker keeps; what processes hold of it is a
// port. It survives everything: an outage only keeps others from reaching it.
type broker struct {
	service
	w *world

	mu      sync.Mutex // guards what follows
	jobs    []*job     // the oldest first
	waiters []*waiter  // the one that has waited longest first
	boxes   map[string]*box
	ears    []*ear
	// history has all jobs that there were, by operation.
	history map[string][]*job
	// fences are the last attempts of jobs that were withdrawn, by operation.
	fences map[string]uint32
}

// A job is one in the broker. Its fields are guarded by broker.mu.
type job struct {
	msg         *queuepb.Job
	act         *act
	label       string
	publication uint64 // where jobs are apart: which Publish it is of
	// attempt counts deliveries, on top of fence, where an earlier job of the
	// name was withdrawn.
	attempt, fence uint32
	lease          *lease
	cancelled      bool
	ended          bool
	failures       []string
	replies        []string
	news           *queuepb.Update // the newest of the worker that has it
	released       time.Duration   // when the last lease ended
}

// A lease is one delivery. Its fields are guarded by broker.mu.
type lease struct {
	b       *broker
	job     *job
	attempt uint32
	holder  *process
	worker  string        // as its updates say
	since   time.Duration // when it was given
	// renewed is when it was taken or extended last.
	renewed time.Duration
	timer   *time.Timer
	over    string // how it ended
	handle  *handle
}

// A waiter is a process's request for a job.
type waiter struct {
	p     *process
	pools []string
	given chan *handle // of capacity 1: a waiter gets one job
	// The rest is guarded by broker.mu.
	asked, left bool
}

func newBroker(w *world) *broker {
	return &broker{service: service{name: "broker"}, w: w, boxes: map[string]*box{}, history: map[string][]*job{}, fences: map[string]uint32{}}
}

// publish takes a job in.
func (b *broker) publish(msg *queuepb.Job, publication uint64, base uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	j := &job{msg: msg, act: b.w.actOf(msg.GetActionDigest()), label: b.w.label(msg.GetOperation()), publication: publication, fence: base, attempt: base}
	j.replies = []string{msg.GetReplyTo()}
	b.box(msg.GetReplyTo())
	if old := b.find(msg.GetOperation()); old != nil && b.w.plan.kind == sharedJobs {
		if !old.cancelled {
			b.share(old, msg.GetReplyTo())
			return
		}
		// Its worker has not let go of it yet. What that still reports is not
		// about this job.
		j.fence, j.attempt = old.attempt, old.attempt
		b.withdrawn(old)
	}
	if b.w.plan.kind == sharedJobs { // or late reports about a withdrawn one would count
		j.fence = max(j.fence, b.fences[msg.GetOperation()])
		j.attempt = j.fence
	}
	b.jobs = append(b.jobs, j)
	b.history[msg.GetOperation()] = append(b.history[msg.GetOperation()], j)
	b.w.trace("broker", "job %s published by %s", j.label, msg.GetReplyTo())
	b.match()
}

// share has a job report to one more API server. The mutex is held.
func (b *broker) share(j *job, id string) {
	b.w.trace("broker", "job %s is %s's too", j.label, id)
	if !slices.Contains(j.replies, id) {
		j.replies = append(j.replies, id)
	}
	if j.news != nil {
		b.post(id, j.news)
	}
}

// find is the newest job of an operation that is there. The mutex is held.
func (b *broker) find(operation string) *job {
	for _, j := range slices.Backward(b.jobs) {
		if j.msg.GetOperation() == operation {
			return j
		}
	}
	return nil
}

// match gives jobs to those who wait. The mutex is held.
func (b *broker) match() {
	if b.w.isDown(&b.service) {
		return
	}
	for _, j := range slices.Clone(b.jobs) {
		if j.lease != nil || j.ended {
			continue
		}
		i := slices.IndexFunc(b.waiters, func(wt *waiter) bool { return slices.Contains(wt.pools, j.msg.GetPool()) })
		if i < 0 {
			continue
		}
		wt := b.waiters[i]
		b.waiters = slices.Delete(b.waiters, i, i+1)
		b.give(j, wt)
	}
}

// give leases j. The mutex is held.
func (b *broker) give(j *job, wt *waiter) {
	j.attempt++
	l := &lease{b: b, job: j, attempt: j.attempt, holder: wt.p, since: b.w.now(), renewed: b.w.now()}
	l.handle = newHandle(l)
	j.lease = l
	key := "lease " + j.label
	span := leaseTime
	if b.w.unsettled() && b.w.plan.faults.has(duplicates) && b.w.dice.chance(key+" early", 0.05) {
		span = b.w.dice.between(key, 0, leaseTime)
		b.w.excuse(wt.p.node, "delivered early")
	}
	l.timer = time.AfterFunc(span, func() { b.lapse(l) })
	b.w.trace("broker", "job %s, attempt %d, leased to %s", j.label, l.attempt, wt.p.name)
	b.w.send(key, wt.p.node, &b.service, func() { b.hand(wt, l) }, nil)
}

// hand is the arrival of a lease at its process.
func (b *broker) hand(wt *waiter, l *lease) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case !wt.p.alive(): // it lapses
	case wt.left:
		b.refuse(l)
	default:
		wt.given <- l.handle
	}
}

// refuse has a process hand back a lease that came too late for it.
func (b *broker) refuse(l *lease) {
	b.w.send("not wanted "+l.job.label, l.holder.node, &b.service, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if l.over == "" {
			b.giveBack(l, "not wanted", "")
		}
	}, nil)
}

// lapse is the end of a lease that was not extended.
func (b *broker) lapse(l *lease) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if l.over != "" {
		return
	}
	b.w.checkLapse(l)
	b.giveBack(l, "lapsed", "fell silent")
}

// giveBack ends a lease without an end of its job. The mutex is held.
func (b *broker) giveBack(l *lease, how, failure string) {
	j := l.job
	b.over(l, how)
	j.news = nil
	if j.cancelled {
		b.withdrawn(j)
		return
	}
	if failure != "" {
		j.failures = append(j.failures, fmt.Sprintf("attempt %d: %s %s", l.attempt-j.fence, l.worker, failure))
	}
	if len(j.failures) >= maxAttempts {
		b.w.trace("broker", "job %s: attempts used up", j.label)
		b.end(j, "used up")
		b.tell(j, end(j, l.attempt, l.worker, code.Code_INTERNAL, fmt.Sprintf("%s: %s", queue.ReasonAttempts, strings.Join(j.failures, "; "))))
		return
	}
	b.tell(j, &queuepb.Update{Operation: j.msg.GetOperation(), Attempt: l.attempt, Worker: l.worker, Stage: queuepb.Update_REQUEUED})
	b.match()
}

// over marks the end of a lease. The mutex is held.
func (b *broker) over(l *lease, how string) {
	b.w.trace("broker", "job %s, attempt %d, of %s: %s", l.job.label, l.attempt, l.holder.name, how)
	l.over = how
	l.timer.Stop()
	l.job.released = b.w.now()
	if l.job.lease == l {
		l.job.lease = nil
	}
}

// end forgets a job. The mutex is held.
func (b *broker) end(j *job, how string) {
	if j.lease != nil {
		b.over(j.lease, how)
	}
	if j.cancelled || how == "withdrawn" {
		b.fences[j.msg.GetOperation()] = j.attempt
	}
	j.ended = true
	b.jobs = slices.DeleteFunc(b.jobs, func(k *job) bool { return k == j })
}

// cancel withdraws the job of an operation: where jobs are apart, those of the
// publications given, or all if there are none.
func (b *broker) cancel(operation string, publications []uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, j := range slices.Clone(b.jobs) {
		if j.msg.GetOperation() != operation || j.cancelled ||
			b.w.plan.kind == apartJobs && len(publications) > 0 && !slices.Contains(publications, j.publication) {
			continue
		}
		b.w.trace("broker", "job %s withdrawn", j.label)
		if j.lease == nil {
			b.withdrawn(j)
			continue
		}
		j.cancelled = true
		l := j.lease
		b.w.checkCancelled(l)
		b.w.send("cancel "+j.label, l.holder.node, &b.service, l.handle.cancel, nil)
	}
}

// withdrawn ends a job that was withdrawn. The mutex is held.
func (b *broker) withdrawn(j *job) {
	b.end(j, "withdrawn")
	if b.w.mutation == silentCancel {
		return
	}
	attempt := j.attempt
	if b.w.plan.kind == apartJobs { // it is told by the worker to which it is delivered
		attempt = max(attempt, j.fence+1)
	}
	b.tell(j, end(j, attempt, "", code.Code_CANCELLED, "withdrawn"))
}

// renew is the effect of Extend, Ack, Release and Reject at the broker: f runs
// if the lease is still good. It is no error to end it twice in the same way.
func (b *broker) renew(l *lease, verb string, f func()) (cancelled bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch l.over {
	case "":
	case verb:
		return false, nil
	default:
		return false, queue.ErrLeaseLost
	}
	f()
	return l.job.cancelled, nil
}

func (b *broker) extend(l *lease) (bool, error) {
	return b.renew(l, "extended", func() {
		l.renewed = b.w.now()
		l.timer.Reset(leaseTime)
	})
}

func (b *broker) ack(l *lease) (bool, error) {
	return b.renew(l, "acknowledged", func() { b.over(l, "acknowledged"); b.end(l.job, "acknowledged") })
}

func (b *broker) release(l *lease) (bool, error) {
	return b.renew(l, "released", func() { b.giveBack(l, "released", "") })
}

func (b *broker) reject(l *lease, reason string) (bool, error) {
	return b.renew(l, "rejected", func() {
		b.w.checkReject(l, reason)
		b.giveBack(l, "rejected", "could not run it: "+reason)
	})
}

// wait makes p wait for a job.
func (b *broker) wait(wt *waiter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if wt.left || wt.asked {
		return
	}
	wt.asked = true
	b.waiters = append(b.waiters, wt)
	b.match()
}

// unwait makes it wait no more.
func (b *broker) unwait(wt *waiter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiters = slices.DeleteFunc(b.waiters, func(x *waiter) bool { return x == wt })
}

// end is the broker's own final update of a job.
func end(j *job, attempt uint32, worker string, c code.Code, message string) *queuepb.Update {
	data, err := proto.Marshal(&repb.ExecuteResponse{Status: &spb.Status{Code: int32(c), Message: message}})
	if err != nil {
		panic(err) // our own names are UTF-8
	}
	return &queuepb.Update{
		Operation: j.msg.GetOperation(), Attempt: attempt, Worker: worker, Stage: queuepb.Update_COMPLETED, ExecuteResponse: data,
	}
}

// tell sends an update of the broker's own to all who want to know of j. The
// mutex is held.
func (b *broker) tell(j *job, u *queuepb.Update) {
	u.Sent = timestamppb.Now()
	for _, id := range j.replies {
		b.post(id, u)
	}
}

// update takes in a worker's update.
func (b *broker) update(replyTo string, u *queuepb.Update) {
	b.mu.Lock()
	defer b.mu.Unlock()
	ids := []string{replyTo}
	for _, j := range b.jobs {
		if j.msg.GetOperation() != u.GetOperation() || b.w.plan.kind == apartJobs && j.msg.GetReplyTo() != replyTo {
			continue
		}
		if b.w.plan.kind == sharedJobs {
			if u.GetAttempt() <= j.fence {
				return
			}
			ids = j.replies
		}
		if l := j.lease; l != nil && l.attempt == u.GetAttempt() {
			l.worker = u.GetWorker()
			if u.GetStage() != stageToCome {
				j.news = u
			}
		}
	}
	for _, id := range ids {
		b.post(id, u)
	}
}
