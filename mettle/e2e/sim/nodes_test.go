//go:build linux

package sim_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/retry"
	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// A door lets one in at a time. Unlike a mutex, it lets the bubble's time go by.
type door chan struct{}

func newDoor() door { return make(door, 1) }

func (d door) lock() (unlock func()) {
	d <- struct{}{}
	return func() { <-d }
}

// An apiNode is where an API server runs.
type apiNode struct {
	w    *world
	node string

	// changing is held while it is started or ended.
	changing door
	lives    int

	mu  sync.Mutex // guards now
	now *apiProcess
}

type apiProcess struct {
	*process
	server   *api.Server
	registry *prometheus.Registry
	stop     context.CancelFunc
	ran      chan error     // what Run has returned
	calls    sync.WaitGroup // Execute and WaitExecution; added to under apiNode.mu
}

func (n *apiNode) name() string { return n.node }

// start starts the next process, if there is none.
func (n *apiNode) start() error {
	defer n.changing.lock()()
	if n.now != nil {
		return nil
	}
	w := n.w
	p := &apiProcess{process: w.newProcess(n.node, n.lives), registry: prometheus.NewRegistry(), ran: make(chan error, 1)}
	n.lives++
	platforms, err := platform.New(platform.Options{FromWorkers: true, Linger: linger})
	if err != nil {
		return err
	}
	o := newPort(w.broker, p.process)
	store, actions, err := w.connect(p.process)
	if err != nil {
		return err
	}
	if p.server, err = api.New(api.Options{
		ID: p.name, Store: store, Actions: actions, Jobs: o, Updates: o, Notices: o, Platforms: platforms,
		AbandonAfter: w.plan.abandonAfter, KeepAlive: keepAlive, Registerer: p.registry,
	}); err != nil {
		return err
	}
	var ctx context.Context
	ctx, p.stop = context.WithCancel(w.ctx)
	go func() { p.ran <- p.server.Run(ctx) }()
	w.trace(p.name, "starts, of release %s", p.peer)
	n.mu.Lock()
	n.now = p
	n.mu.Unlock()
	return nil
}

// enter is the process that is there, with one call more; nil if there is none.
func (n *apiNode) enter() *apiProcess {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.now != nil {
		n.now.calls.Add(1)
	}
	return n.now
}

// take makes the process one that nobody can call any more; nil if there is none.
func (n *apiNode) take() *apiProcess {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := n.now
	n.now = nil
	return p
}

// crash is kill -9.
func (n *apiNode) crash() {
	defer n.changing.lock()()
	if p := n.take(); p != nil {
		n.w.trace(p.name, "crashes")
		n.w.excuse(n.node, "a crash")
		p.kill()
		p.finish(n.w)
	}
}

// end is SIGTERM.
func (n *apiNode) end() {
	defer n.changing.lock()()
	if p := n.take(); p != nil {
		n.w.trace(p.name, "is told to end")
		n.w.excuse(n.node, "an end")
		p.server.Shutdown()
		p.calls.Wait()
		p.finish(n.w)
		p.kill()
		n.w.trace(p.name, "has ended")
	}
}

// finish waits for all that the process has started.
func (p *apiProcess) finish(w *world) {
	p.stop()
	if err := <-p.ran; err != nil && !errors.Is(err, queue.ErrClosed) && p.alive() {
		w.violate("%s: Run: %v", p.name, err)
	}
	p.calls.Wait()
}

// A workerNode is where a worker runs.
type workerNode struct {
	w    *world
	node string

	changing door // held while it is started or ended
	lives    int
	now      *workerProcess
	sick     atomic.Int32 // how often it is
}

type workerProcess struct {
	*process
	worker *worker.Worker
	dir    string
	stop   context.CancelFunc
	ran    chan error
}

func (n *workerNode) name() string { return n.node }

// linger is for how long actions are accepted for a pool whose workers are gone.
const linger = 30 * time.Second

// poolOf is what a worker takes and has.
func (w *world) poolOf(n *workerNode) ([]string, []platform.Property) {
	if w.plan.big[slices.Index(w.workers, n)] {
		return []string{"big"}, []platform.Property{{Name: "size", Value: "big"}}
	}
	return []string{queue.DefaultPool}, nil
}

// connect is the storage as a process has it.
func (w *world) connect(p *process) (blob.Store, worker.Actions, error) {
	c := &cable{w.storage, p}
	if !w.plan.patient {
		return c, c, nil
	}
	r, err := retry.New(retry.Options{Jitter: func(d time.Duration) time.Duration { return w.dice.between("patience of "+p.node, 0, d+1) }})
	if err != nil {
		return nil, nil, err
	}
	return r.Store(c), r.Actions(c), nil
}

func (n *workerNode) start() error {
	defer n.changing.lock()()
	if n.now != nil {
		return nil
	}
	w := n.w
	p := &workerProcess{process: w.newProcess(n.node, n.lives), ran: make(chan error, 1)}
	n.lives++
	p.dir = filepath.Join(w.dir, p.name)
	o := newPort(w.broker, p.process)
	store, actions, err := w.connect(p.process)
	if err != nil {
		return err
	}
	pools, properties := w.poolOf(n)
	if p.worker, err = worker.New(worker.Options{
		Jobs: o, Updates: o, Store: store, Actions: actions, Dir: p.dir, Name: p.name, Slots: w.plan.slots,
		LeaseExtendEvery: extendEvery, MinFreeDiskBytes: -1, MinFreeMemoryBytes: -1, Notices: o, Pools: pools, Properties: properties,
		Runner: func(int) (runner.Runner, error) { return &hands{w: w, n: n, p: p.process}, nil },
	}); err != nil {
		return err
	}
	var ctx context.Context
	ctx, p.stop = context.WithCancel(w.ctx)
	go func() { p.ran <- p.worker.Run(ctx) }()
	w.trace(p.name, "starts, of release %s", p.peer)
	n.now = p
	return nil
}

func (n *workerNode) crash() {
	defer n.changing.lock()()
	if p := n.now; p != nil {
		n.w.trace(p.name, "crashes")
		n.w.excuse(n.node, "a crash")
		p.kill()
		p.stop()
		p.worker.Abort()
		n.finish(<-p.ran)
	}
}

// drainTimeout is how long a worker may take to end. It is shorter than some
// actions take.
const drainTimeout = time.Minute

// end is SIGTERM, and after a while the second signal.
func (n *workerNode) end() {
	defer n.changing.lock()()
	p := n.now
	if p == nil {
		return
	}
	n.w.trace(p.name, "is told to end")
	n.w.excuse(n.node, "an end")
	p.stop()
	var err error
	select {
	case err = <-p.ran:
	case <-time.After(drainTimeout):
		n.w.excuse(n.node, "an end")
		n.w.trace(p.name, "is told to end at once")
		p.worker.Abort()
		err = <-p.ran
	}
	p.kill()
	n.finish(err)
}

// finish frees what is left of a process that has ended.
func (n *workerNode) finish(err error) {
	p := n.now
	n.now = nil
	if err := errors.Join(err, p.worker.Close(), os.RemoveAll(p.dir)); err != nil {
		n.w.violate("%s did not end well: %v", p.name, err)
	}
	n.w.trace(p.name, "has ended")
}

// hands run the actions of a slot: by the clock, without a process.
type hands struct {
	w *world
	n *workerNode
	p *process
}

// Run implements runner.Runner.
func (h *hands) Run(ctx context.Context, spec runner.Spec) (runner.Result, error) {
	index, err := strconv.Atoi(spec.Args[1])
	if err != nil {
		return runner.Result{}, err
	}
	if h.n.sick.Load() > 0 {
		return runner.Result{}, errSick
	}
	a := h.w.plan.actions[index]
	res := runner.Result{Start: time.Now(), ExitCode: a.exitCode()}
	x := h.w.executes(h.p, a)
	timer := time.NewTimer(a.takes)
	defer timer.Stop()
	if a.kind == poison {
		timer.Stop()       // the end comes otherwise
		h.w.spawn(func() { //nolint:contextcheck // the fleet outlives the action
			time.Sleep(h.w.dice.between("poison", 0, time.Second))
			h.n.kill(h.p)
		})
	}
	select {
	case <-timer.C:
	case <-ctx.Done():
		h.w.executed(x, false)
		res.End = time.Now()
		return res, context.Cause(ctx)
	}
	h.w.executed(x, true)
	res.End = time.Now()
	in, err := os.ReadFile(filepath.Join(spec.Root, "in"))
	if want := fmt.Sprintf("input of action %d", a.index); err != nil || string(in) != want {
		return res, fmt.Errorf("the input is %q, want %q: %w", in, want, err)
	}
	out := []byte(a.output())
	res.StdoutBytes = int64(len(out))
	return res, errors.Join(os.WriteFile(spec.Stdout, out, 0o600), os.WriteFile(filepath.Join(spec.Root, "out"), out, 0o600))
}

var errSick = errors.New("no processes are to be had")

// Probe is how a worker asks whether commands can run again.
func (h *hands) Probe(context.Context, string) error {
	if h.n.sick.Load() > 0 {
		return errSick
	}
	return nil
}

// Close implements runner.Runner.
func (h *hands) Close() error { return nil }

// kill crashes the process, if it is the one that runs, and starts another.
func (n *workerNode) kill(p *process) {
	if !p.alive() {
		return
	}
	n.crash()
	time.Sleep(n.w.dice.between("restart "+n.node, 100*time.Millisecond, 10*time.Second))
	if err := n.start(); err != nil {
		n.w.violate("%s does not start: %v", n.node, err)
	}
}
