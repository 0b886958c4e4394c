//go:build linux

package worker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// A gate is what slots pass before they take a job. It is shut while the worker
// could only fail: while the disk is full or memory is low, and while a slot has
// failed by the worker's own fault and not yet shown that it can run commands
// again. What runs goes on. Slots that wait for a job leave the queue at once.
type gate struct {
	// look says what the machine lacks; empty: nothing.
	look func() string
	// tell is told why the gate is shut, and by "" that it is open.
	tell func(reason string)

	// changing is held by who changes something until that was told, so that it is
	// told in order. Who passes needs only mu.
	changing sync.Mutex

	mu     sync.Mutex // guards the rest
	looked time.Time
	lacks  string         // what look said
	faults map[int]string // by slot
	reason string
	ended  bool
	// base is run's. Taking, its child, is what slots lease under, and is ended when
	// the gate is shut; nil while it is shut.
	base, taking context.Context //nolint:containedctx // one that comes and goes is what the gate is about
	shut         context.CancelFunc
	opened       chan struct{} // closed when the gate is opened
}

const (
	// lookEvery bounds how often slots that take jobs have the machine looked at:
	// that takes up to half a millisecond, nearly all of it in /proc and control
	// groups.
	lookEvery = 500 * time.Millisecond
	// patrol is how often it is looked at beside that, while all is well, and
	// repairPoll while it is not.
	patrol     = 5 * time.Second
	repairPoll = time.Second
)

var errShut = errors.New("no job is taken")

// notYet is the reason at the start, which is no trouble.
const notYet = "the preflight has not passed yet"

func newGate(look func() string, tell func(string)) *gate {
	return &gate{look: look, tell: tell, faults: make(map[int]string), opened: make(chan struct{})}
}

// begin opens the gate, unless the machine lacks something. Slots lease under
// children of ctx.
func (g *gate) begin(ctx context.Context) {
	g.mu.Lock()
	g.base = ctx
	g.mu.Unlock()
	g.inspect(0)
}

// run looks after the machine until ctx, that of begin, is done, and then shuts
// the gate for good.
func (g *gate) run(ctx context.Context) {
	defer g.end()
	for {
		every := patrol
		if g.lacking() {
			every = repairPoll
		}
		t := time.NewTimer(every)
		select {
		case <-t.C:
			g.inspect(0)
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

func (g *gate) lacking() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.lacks != ""
}

// inspect looks at the machine, unless somebody has within the time of fresh.
func (g *gate) inspect(fresh time.Duration) {
	g.mu.Lock()
	now := time.Now()
	if fresh > 0 && now.Sub(g.looked) < fresh {
		g.mu.Unlock()
		return
	}
	g.looked = now
	g.mu.Unlock()
	lacks := g.look()
	g.change(func() { g.lacks = lacks })
}

// change calls f with the mutex held, and opens or shuts the gate as follows from
// what f has done.
func (g *gate) change(f func()) {
	g.changing.Lock()
	defer g.changing.Unlock()
	g.mu.Lock()
	f()
	changed := g.settle()
	reason := g.reason
	g.mu.Unlock()
	if changed {
		g.tell(reason)
	}
}

// fault shuts the gate because of a slot, until mend.
func (g *gate) fault(slot int, reason string) {
	g.change(func() { g.faults[slot] = reason })
}

// mend takes back what was said of a slot.
func (g *gate) mend(slot int) {
	g.change(func() { delete(g.faults, slot) })
}

// end shuts the gate for good, and has those who wait at it go.
func (g *gate) end() {
	g.changing.Lock()
	defer g.changing.Unlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = true
	if g.taking != nil {
		g.shut()
		g.taking = nil
	}
	select {
	case <-g.opened:
	default:
		close(g.opened)
	}
}

// settle opens or shuts the gate as it should be, and reports whether there is
// something to tell. The mutex is held.
func (g *gate) settle() bool {
	if g.ended || g.base == nil {
		return false
	}
	reason := g.lacks
	if slots := g.faulty(); reason == "" && len(slots) > 0 {
		reason = g.faults[slots[0]]
	}
	if reason == g.reason && (g.taking != nil) == (reason == "") {
		return false
	}
	g.reason = reason
	switch {
	case reason == "" && g.taking == nil:
		g.taking, g.shut = context.WithCancel(g.base)
		close(g.opened)
	case reason != "" && g.taking != nil:
		g.shut()
		g.taking, g.opened = nil, make(chan struct{})
	}
	return true
}

// faulty lists the slots with faults, sorted. The mutex is held.
func (g *gate) faulty() []int {
	slots := make([]int, 0, len(g.faults))
	for i := range g.faults {
		slots = append(slots, i)
	}
	slices.Sort(slots)
	return slots
}

// pass waits until the gate is open, and returns what to lease under: it is done
// when the gate is shut again. It reports whether there is any such; not when
// ctx is done, or abort closed, or the gate has ended. Idle is called before it
// waits.
func (g *gate) pass(ctx context.Context, abort <-chan struct{}, idle func()) (context.Context, bool) {
	g.inspect(lookEvery)
	for {
		g.mu.Lock()
		taking, opened, ended := g.taking, g.opened, g.ended
		g.mu.Unlock()
		switch {
		case ended || ctx.Err() != nil:
			return nil, false
		case taking != nil:
			return taking, true
		}
		idle()
		select {
		case <-opened:
		case <-abort:
			return nil, false
		case <-ctx.Done():
			return nil, false
		}
	}
}

// machine says what this machine lacks for another action.
func (w *Worker) machine() string {
	if err := w.o.checkDisk(); err != nil {
		return err.Error()
	}
	if err := w.memory.check(); err != nil {
		w.o.slots.dropTools()
		return err.Error()
	}
	return ""
}

// told is what the gate tells, one reason after the other: Ready, the log, the
// metrics and the API servers get to know. The log is not told each second that
// what is free are some bytes more or less.
func (w *Worker) told(reason string) {
	kind := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, reason)
	switch {
	case reason == "":
		w.o.Logger.Info("taking jobs", "worker", w.o.Name)
	case reason == notYet, kind == w.logged:
	default:
		w.o.Logger.Error("no job is taken", "worker", w.o.Name, "reason", reason)
	}
	w.logged = kind
	if reason == "" {
		w.metrics.taking.Set(1)
		w.setState(nil)
	} else {
		w.metrics.taking.Set(0)
		w.setState(fmt.Errorf("%w: %s", errShut, reason))
	}
	w.announce(reason)
}
