//go:build linux

package sim_test

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// checks is what is written down while a world runs, and what was wrong.
type checks struct {
	cmu        sync.Mutex // guards what follows
	violations []string
	givenUp    bool // also guarded by world.mu; see giveUp
	excuses    map[string][]excuse
	stats      stats
	running    map[*execution]struct{}
	completed  map[int]int // executions of an action that came to their end
	heard      map[string]uint32
	stale      map[string]bool // responses that were out of date
	fresh      map[string]bool // and those that were not
	left       map[int]time.Duration
	waiting    map[int]int // clients that have not left, by action
}

// An excuse is a time in which something may fail at a node.
type excuse struct {
	from, to time.Duration
	why      string
}

// An execution is a run of an action's command.
type execution struct {
	a     *act
	p     *process
	since time.Duration
}

func (c *checks) init() {
	c.excuses = map[string][]excuse{}
	c.running = map[*execution]struct{}{}
	c.completed = map[int]int{}
	c.heard = map[string]uint32{}
	c.stale, c.fresh = map[string]bool{}, map[string]bool{}
	c.left, c.waiting = map[int]time.Duration{}, map[int]int{}
}

// maxViolations is more than anybody reads.
const maxViolations = 10

func (w *world) violate(format string, args ...any) {
	text := fmt.Sprintf("at %v: ", w.now()) + fmt.Sprintf(format, args...)
	w.trace("VIOLATION", format, args...)
	w.cmu.Lock()
	defer w.cmu.Unlock()
	if len(w.violations) < maxViolations {
		w.violations = append(w.violations, text)
	}
}

// grace is for how long a fault at one moment may show.
const grace = 15 * time.Second

func (w *world) excuse(node, why string) { w.excuseFor(node, 0, why) }

func (w *world) excuseFor(node string, span time.Duration, why string) {
	w.cmu.Lock()
	defer w.cmu.Unlock()
	now := w.now()
	w.excuses[node] = append(w.excuses[node], excuse{now, now + span + grace, why})
}

// excused says whether something was wrong at a node, or everywhere, in a time.
func (w *world) excused(node string, from, to time.Duration) bool {
	w.cmu.Lock()
	defer w.cmu.Unlock()
	return overlap(w.excuses[node], from, to) || overlap(w.excuses["*"], from, to)
}

// excusedAny is excused for any of the nodes whose names begin so.
func (w *world) excusedAny(prefix string, from, to time.Duration) bool {
	w.cmu.Lock()
	defer w.cmu.Unlock()
	for node, es := range w.excuses {
		if (node == "*" || strings.HasPrefix(node, prefix)) && overlap(es, from, to) {
			return true
		}
	}
	return false
}

func overlap(es []excuse, from, to time.Duration) bool {
	for _, e := range es {
		if e.from <= to && from <= e.to {
			return true
		}
	}
	return false
}

func (w *world) hasGivenUp() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.givenUp
}

func (w *world) crashed() {
	w.cmu.Lock()
	defer w.cmu.Unlock()
	w.stats.crashes++
}

func (w *world) resumes() {
	w.cmu.Lock()
	defer w.cmu.Unlock()
	w.stats.resumed++
}

func (w *world) ended(code codes.Code) {
	w.cmu.Lock()
	defer w.cmu.Unlock()
	w.stats.ends++
	if code != codes.OK {
		w.stats.errors++
	}
}

func (w *world) hasLeft(c *client) {
	w.cmu.Lock()
	defer w.cmu.Unlock()
	w.left[c.action.index] = max(w.left[c.action.index], w.now())
}

func (w *world) executes(p *process, a *act) *execution {
	x := &execution{a, p, w.now()}
	w.trace(p.name, "runs action %d, which %s in %v", a.index, a.kind, a.takes)
	w.cmu.Lock()
	defer w.cmu.Unlock()
	w.stats.executions++
	w.running[x] = struct{}{}
	return x
}

func (w *world) executed(x *execution, whole bool) {
	w.trace(x.p.name, "has run action %d, to its end: %v", x.a.index, whole)
	w.cmu.Lock()
	defer w.cmu.Unlock()
	delete(w.running, x)
	if whole {
		w.completed[x.a.index]++
	}
}

// checkLapse: a lease lapses only if its worker is dead or cut off. The broker's
// mutex is held.
func (w *world) checkLapse(l *lease) {
	w.cmu.Lock()
	w.stats.lapses++
	w.cmu.Unlock()
	if l.holder.alive() && !w.excused(l.holder.node, l.renewed, w.now()) {
		w.violate("the lease of %s, attempt %d, lapsed, though all was well with %s", l.job.label, l.attempt, l.holder.name)
	}
}

// checkReject: a worker rejects a job only if it is sick, or was cut off from the
// storage. The broker's mutex is held.
func (w *world) checkReject(l *lease, reason string) {
	if !w.excused(l.holder.node, l.since, w.now()) {
		w.violate("%s rejected %s, though all was well: %s", l.holder.name, l.job.label, reason)
	}
}

// cancelTime is how long the worker of a job that was withdrawn may take to let
// go of it: it hears of it when it next extends, and reports it.
const cancelTime = extendEvery + 2*callTimeout

// checkCancelled: the worker of a job that is withdrawn lets go of it. The
// broker's mutex is held.
func (w *world) checkCancelled(l *lease) {
	w.cmu.Lock()
	w.stats.withdrawn++
	w.cmu.Unlock()
	from := w.now()
	time.AfterFunc(cancelTime, func() {
		w.broker.mu.Lock()
		over := l.over != ""
		w.broker.mu.Unlock()
		if !over && l.holder.alive() && !w.excused(l.holder.node, from, w.now()) {
			w.violate("%s still has %s, which was withdrawn %v ago", l.holder.name, l.job.label, cancelTime)
		}
	})
}

// checkStale notes results that come too late: of an older attempt than the
// server has heard of. Where jobs are apart they count all the same.
func (w *world) checkStale(p *process, u *queuepb.Update) {
	key := p.name + " " + u.GetOperation()
	w.cmu.Lock()
	defer w.cmu.Unlock()
	if u.GetAttempt() > w.heard[key] {
		w.heard[key] = u.GetAttempt()
	}
	if u.GetStage() != queuepb.Update_COMPLETED {
		return
	}
	if id := p.name + string(u.GetExecuteResponse()); u.GetAttempt() < w.heard[key] {
		w.stale[id] = true
	} else {
		w.fresh[id] = true
	}
}

// asksAnew: a job that is published may be a new one, whose attempts begin at 1.
func (w *world) asksAnew(p *process, operation string) {
	w.cmu.Lock()
	defer w.cmu.Unlock()
	delete(w.heard, p.name+" "+operation)
}

// checkNotStale: a late report of an older attempt changes nothing.
func (w *world) checkNotStale(c *client, n *apiNode, response []byte) {
	if w.plan.kind == apartJobs {
		return
	}
	n.mu.Lock()
	p := n.now
	n.mu.Unlock()
	if p == nil {
		return
	}
	id := p.name + string(response)
	w.cmu.Lock()
	late := w.stale[id] && !w.fresh[id]
	w.cmu.Unlock()
	if late {
		w.violate("%s: the result is a late report of an older attempt", c.who())
	}
}

// checkUsedUp: attempts are used up only where the broker has counted them.
func (w *world) checkUsedUp(c *client, message string) {
	w.broker.mu.Lock()
	defer w.broker.mu.Unlock()
	for _, jobs := range w.broker.history {
		for _, j := range jobs {
			if j.act == c.action && len(j.failures) >= maxAttempts {
				return
			}
		}
	}
	w.violate("%s: %s, but they are not", c.who(), message)
}

// staleNews is how long a client may be told that a worker has its job when none
// has: a keep-alive, or the time that calls take.
const staleNews = keepAlive + 2*callTimeout

// checkMessage checks what every message has to be.
func (c *client) checkMessage(n *apiNode, began time.Duration, op *longrunningpb.Operation) {
	w := c.w
	if c.name == "" {
		c.name = op.GetName()
		w.trace(c.who(), "has %s", w.label(c.name))
		if name := c.name; c.visit.cancels > 0 && !c.cancelled.Load() {
			c.visit.cancels = max(c.visit.cancels, 1)
			w.spawn(func() { c.cancelLater(name) })
		}
	}
	if op.GetName() != c.name {
		w.violate("%s: the operation is called %s, was %s", c.who(), w.label(op.GetName()), w.label(c.name))
	}
	md := &repb.ExecuteOperationMetadata{}
	if err := op.GetMetadata().UnmarshalTo(md); err != nil {
		w.violate("%s: the metadata: %v", c.who(), err)
		return
	}
	w.trace(c.who(), "%s is %s", w.label(op.GetName()), md.GetStage())
	if (md.GetStage() == repb.ExecutionStage_COMPLETED) != op.GetDone() {
		w.violate("%s: done is %v in stage %s", c.who(), op.GetDone(), md.GetStage())
	}
	from := w.now() - staleNews
	if md.GetStage() == repb.ExecutionStage_EXECUTING && from > began && !w.excused(n.node, from-leaseTime, w.now()) && !w.leasedSince(c.action, from) {
		w.violate("%s: %s is said to be executing, and no worker has had it since %v", c.who(), w.label(op.GetName()), from)
	}
}

// leasedSince says whether a worker has had a job of an action after t.
func (w *world) leasedSince(a *act, t time.Duration) bool {
	w.broker.mu.Lock()
	defer w.broker.mu.Unlock()
	for _, jobs := range w.broker.history {
		for _, j := range jobs {
			if j.act == a && (j.lease != nil || j.released > t) {
				return true
			}
		}
	}
	return false
}

// read is a blob's content.
func (w *world) read(p *repb.Digest) string {
	d, err := digest.FromProto(digest.SHA256, p)
	if err != nil {
		return err.Error()
	}
	data, err := blob.ReadAll(w.ctx, w.storage.blobs, d, 1<<20)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// settleTime is how long a fleet that nobody wants anything of any more may take
// to come to rest: the longest action, as often as it may fail.
const settleTime = 3 * time.Hour

// checkQuiet: in the end no job, no operation and no execution is left.
func (w *world) checkQuiet() {
	for from := w.now(); ; time.Sleep(5 * time.Second) {
		left := w.leftovers()
		if left == "" {
			break
		}
		if w.now()-from > settleTime {
			w.violate("something is left: %s %s", left, w.state())
			break
		}
	}
	if w.plan.faults == noFaults {
		w.checkNothingTwice()
	}
}

func (w *world) leftovers() string {
	w.broker.mu.Lock()
	jobs := len(w.broker.jobs)
	w.broker.mu.Unlock()
	w.cmu.Lock()
	running := len(w.running)
	w.cmu.Unlock()
	operations := 0
	for _, a := range w.apis {
		a.mu.Lock()
		p := a.now
		a.mu.Unlock()
		if p != nil {
			operations += p.operations()
		}
	}
	if jobs+running+operations == 0 {
		return ""
	}
	return fmt.Sprintf("%d jobs, %d executions, %d operations;", jobs, running, operations)
}

// operations counts those in flight.
func (p *apiProcess) operations() (n int) {
	families, err := p.registry.Gather()
	if err != nil {
		return 0
	}
	for _, f := range families {
		if f.GetName() != "mettle_operations" && f.GetName() != "mettle_executes_in_flight" {
			continue
		}
		for _, m := range f.GetMetric() {
			n += int(m.GetGauge().GetValue())
		}
	}
	return n
}

// checkNothingTwice: where nothing goes wrong, an action runs at most once on
// behalf of each API server, and one that may not be cached once for each client.
func (w *world) checkNothingTwice() {
	asked := map[int]int{}
	for _, v := range w.plan.clients {
		asked[v.action]++
	}
	for i, a := range w.plan.actions {
		limit := min(asked[i], len(w.apis))
		if a.kind != succeeds {
			limit = asked[i]
		}
		if n := w.completed[i]; n > limit || n == 0 {
			w.violate("action %d, which %s and was asked for %d times, ran %d times, want 1 to %d", i, a.kind, asked[i], n, limit)
		}
	}
}
