//go:build linux

package sim_test

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// jobsKind is how a broker takes a job that two API servers publish.
type jobsKind int

const (
	// sharedJobs are one job, which reports to both.
	sharedJobs jobsKind = iota
	// apartJobs are two.
	apartJobs
)

func (k jobsKind) String() string { return [...]string{"shared", "apart"}[k] }

// faults is a set of what may go wrong.
type faults uint

const (
	crashAPI    faults = 1 << iota // an API server dies at once
	crashWorker                    // a worker does
	restarts                       // either is told to end, and is started anew
	partitions                     // a process can't reach the broker or the store
	losses                         // requests and replies are lost
	delays                         // messages take seconds
	duplicates                     // updates come twice, jobs are delivered early
	brokenConns                    // connections of clients end, some unnoticed
	storeAway                      // the store does not answer, or late
	brokerAway                     // the broker does not answer
	leaving                        // clients go away for good
	cancelling                     // and operations are cancelled
	sickness                       // workers can't run what they should
	oddActions                     // actions that fail, hang, kill, are not cacheable
	numFaults   = iota
	noFaults    = faults(0)
)

func (f faults) has(g faults) bool { return f&g != 0 }

func (f faults) String() string {
	var s []string
	for i, name := range [numFaults]string{
		"crash-api", "crash-worker", "restarts", "partitions", "losses", "delays", "duplicates", "broken-conns", "store-away", "broker-away",
		"leaving", "cancelling", "sickness", "odd-actions",
	} {
		if f.has(1 << i) {
			s = append(s, name)
		}
	}
	return "[" + strings.Join(s, " ") + "]"
}

// The times of the fleet.
const (
	leaseTime   = 30 * time.Second
	extendEvery = 10 * time.Second
	keepAlive   = 20 * time.Second
	maxAttempts = 3
	// deadline is when the last client must have its answer. The slowest way to one
	// is an action of minutes whose every attempt but the last is lost.
	deadline = 3 * time.Hour
)

// A plan is what a seed stands for.
type plan struct {
	seed    uint64
	kind    jobsKind
	faults  faults
	apis    int
	workers int
	slots   int
	// patient says that calls of the store are tried again for a while, as in
	// elan/blob/retry.
	patient bool
	// mixed says that each process is of some release, see peer.
	mixed bool
	// big says of each worker whether it is of the other pool, which some actions
	// ask for.
	big []bool
	// abandonAfter is the API servers'.
	abandonAfter time.Duration
	// horizon is when all is well again.
	horizon time.Duration
	actions []*act
	clients []visit
}

// A visit is one client's wish.
type visit struct {
	action int
	at     time.Duration
	// leaves is how long after that it goes away, if it still waits; 0: never.
	leaves time.Duration
	// cancels is how long after that the operation is cancelled; 0: it is not.
	cancels time.Duration
}

func (p *plan) String() string {
	return fmt.Sprintf("seed %d: %s jobs, %d api, %d worker × %d, %d actions, %d clients, until %v, abandon after %v, mixed %v, faults %v",
		p.seed, p.kind, p.apis, p.workers, p.slots, len(p.actions), len(p.clients), p.horizon, p.abandonAfter, p.mixed, p.faults)
}

// newPlan makes the plan of a seed. One seed in sixteen has no faults: then
// nothing needs an explanation.
func newPlan(d *dice) *plan {
	p := &plan{
		seed:         d.seed,
		kind:         jobsKind(d.among("plan kind", 2)),
		apis:         1 + d.among("plan apis", 3),
		workers:      1 + d.among("plan workers", 4),
		slots:        1 + d.among("plan slots", 2),
		abandonAfter: d.between("plan abandon", 10*time.Second, 3*time.Minute),
		patient:      d.chance("plan patient", 0.5),
		mixed:        d.chance("plan mixed", 0.5),
		horizon:      d.between("plan horizon", time.Minute, 6*time.Minute),
	}
	if d.seed%16 != 0 {
		for i := range numFaults {
			if d.chance(fmt.Sprint("plan fault ", i), 0.4) {
				p.faults |= 1 << i
			}
		}
	}
	for i := range p.workers { // the first is never the only one that an action can have
		p.big = append(p.big, i > 0 && d.chance("plan big", 0.4))
	}
	for i := range 2 + d.among("plan actions", 6) {
		a := newAct(d, p.faults, i)
		a.big = slices.Contains(p.big, true) && d.chance("act is big", 0.4)
		p.actions = append(p.actions, a)
	}
	for i := range len(p.actions) + d.among("plan clients", 5) {
		v := visit{action: i, at: d.between("plan visit", 0, p.horizon)}
		if i >= len(p.actions) {
			v.action = d.among("plan visit action", len(p.actions))
		}
		if d.chance("plan together", 0.3) {
			v.at = d.between("plan visit", 0, 100*time.Millisecond)
		}
		if p.faults.has(leaving) && d.chance("plan leaves", 0.4) {
			v.leaves = d.between("plan leaves after", 0, 2*time.Minute)
		}
		if p.faults.has(cancelling) && d.chance("plan cancels", 0.4) {
			v.cancels = d.between("plan cancels after", time.Millisecond, 2*time.Minute)
		}
		p.clients = append(p.clients, v)
	}
	return p
}

// actKind is what an action does.
type actKind int

const (
	succeeds actKind = iota
	fails            // its exit code is not 0
	uncached         // it may not be cached
	hangs            // longer than its timeout
	poison           // it ends its worker
	lacks            // a blob of its inputs is not there
	numKinds
)

func (k actKind) String() string {
	return [...]string{"succeeds", "fails", "uncached", "hangs", "poison", "lacks"}[k]
}

// An act is an action of the plan.
type act struct {
	index   int
	kind    actKind
	takes   time.Duration
	timeout time.Duration
	big     bool // it asks for the other pool
}

func newAct(d *dice, f faults, i int) *act {
	a := &act{index: i, timeout: 10 * time.Minute}
	a.takes = d.between("act takes", 10*time.Millisecond, 5*time.Second)
	if d.chance("act is long", 0.4) {
		a.takes = d.between("act takes", 5*time.Second, 3*time.Minute)
	}
	if f.has(oddActions) && d.chance("act is odd", 0.5) {
		a.kind = actKind(1 + d.among("act kind", int(numKinds)-1))
	}
	if a.kind == hangs {
		a.timeout, a.takes = a.takes, 2*time.Hour
	}
	return a
}

// output is what it prints and makes.
func (a *act) output() string { return fmt.Sprintf("what action %d makes of its inputs", a.index) }

func (a *act) exitCode() int {
	if a.kind == fails {
		return 1 + a.index
	}
	return 0
}
