//go:build linux

// Package worker runs jobs: it leases one for each free slot, builds its input
// root, runs its command, takes its outputs in, stores the result, reports, and
// acknowledges, in this order, so that a worker that dies at any moment loses
// nothing but time. A lease is extended while its job runs; one that is lost or
// cancelled has its command killed.
//
// A job that fails by the worker's own fault goes back to the queue, not to its
// client, and the worker takes no other before its preflight has passed; nor while
// disk or memory is low. Ready says why, and package presence tells API servers,
// which hear from it that the worker is there at all.
//
// Executor is one slot's way from a job to an ExecuteResponse, without a queue;
// Worker is the loop around it. The folders are the stations: inputroot, runner,
// output. The mains of dual and worker make a Worker; mettle one uses One.
//
// What an action can't do to others: commands run as a user of their slot where
// the worker is root, so inputs that are hard links to the store's files can't be
// written or chmodded by them, and the files of other slots are out of reach.
// Without root, all commands are the worker's user; linked inputs are audited
// after each command, and a changed one is withdrawn from the store and fails
// the action. A sandbox does better; this is what works everywhere.
package worker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/worker/cgroup"
	"github.com/mettle-build/mettle/mettle/worker/image"
	"github.com/mettle-build/mettle/mettle/worker/livelog"
	"github.com/mettle-build/mettle/mettle/worker/persistent"
	"github.com/mettle-build/mettle/mettle/worker/presence"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Actions is the ActionCache as a worker needs it.
type Actions interface {
	action.Getter
	action.Putter
}

// Failures keeps what failed, for people to look at: an *action.Failures.
type Failures interface {
	Put(ctx context.Context, k blob.EntryKey, resp *repb.ExecuteResponse) error
}

// Options are those of New.
type Options struct {
	// Jobs and Updates are the two sides of the queue. Required.
	Jobs    queue.Consumer
	Updates queue.Sender
	// Store has the inputs and takes the outputs. Required.
	Store blob.Store
	// Stores gives the blobs of an instance, where each has its own: see
	// elan/blob/instances. nil: Store, for all of them.
	Stores func(instance string) blob.Store
	// Actions takes the results. Required.
	Actions Actions
	// Failures takes the results of actions that failed. nil: nobody does.
	Failures Failures
	// LogStreams take what commands print that run for more than a second, so that it
	// can be read meanwhile. nil: it can't be.
	LogStreams livelog.Streams
	// Dir is the worker's own directory, which is made if need be and emptied
	// at each start. To use hard links it is on the store's file system; to
	// use a user for each slot, every user can enter its parents. Required.
	Dir string
	// Name is the worker's in results and messages. Default: the host's name.
	Name string
	// Addr is the address of a server from which users can fetch an action to
	// look at it again; it is only mentioned in messages.
	Addr string
	// Slots is the number of actions at once, at most 512. 0: the number of
	// CPUs.
	Slots int
	// Pools are those whose jobs are taken. Default: queue.DefaultPool.
	Pools []string
	// Preflight is a command that shows, by exit code 0, that this machine has what
	// actions need. It runs as they do, in each slot: before the first job is taken,
	// and after a job failed by the worker's fault. Default: none, beside one that
	// does nothing.
	Preflight []string
	// Notices is told that the worker is there, and how it does. nil: nobody is.
	// Name is unique among the workers then.
	Notices queue.Notifier
	// Properties are what Notices is told that the worker offers.
	Properties []platform.Property
	// AnnounceAfter is how long an action runs before its API server is told that it
	// does: of one that is over sooner, it hears the end alone. 0: 20 ms, less than
	// anybody sees. Negative: at once.
	AnnounceAfter time.Duration
	// DefaultTimeout is that of actions without one. 0: an hour.
	DefaultTimeout time.Duration
	// MaxTimeout bounds every timeout. 0: no bound.
	MaxTimeout time.Duration
	// LeaseExtendEvery is how often a lease is extended: well below the queue's
	// lease time. 0: 10 s, a third of the usual one.
	LeaseExtendEvery time.Duration
	// MinFreeDiskBytes is what must be free on the file system of Dir before a
	// job is leased. It is to be well below what the store leaves free, or a
	// full store ends all work. 0: an eightieth of the disk, at most 512 MiB.
	// Negative: no bound.
	MinFreeDiskBytes int64
	// MinFreeMemoryBytes is what must be available, on the machine and in the
	// worker's control group, before a job is leased. 0: a twentieth of it, at
	// most 512 MiB. Negative: no bound.
	MinFreeMemoryBytes int64
	// MaxOutputBytes bounds stdout and stderr, each. 0: 128 MiB.
	MaxOutputBytes int64
	// UIDBase is the user and group of the first slot; slot n has UIDBase+n.
	// Two workers on one machine need bases apart. It matters to root only. 0:
	// 65000. Negative: commands run as the worker's own user.
	UIDBase int
	// Isolation is what keeps actions from the machine. "": Bare.
	Isolation Isolation
	// SandboxRoot is where isolated actions see their input root. "":
	// sandbox.DefaultRoot.
	SandboxRoot string
	// Hide are files and directories of the machine that isolated actions find
	// empty, beside Dir and those of sandbox.AlwaysHidden; Show are those below hidden
	// directories that they see all the same.
	Hide, Show []string
	// Syscalls are those that isolated actions may make.
	Syscalls sandbox.Syscalls
	// Images has the container images that isolated actions ask for, and is closed
	// after the worker. nil: whatever image they ask for, they run on the machine's
	// own file system.
	Images *image.Cache
	// Limits bound each action. New fails where this machine can't hold one of them.
	// Processes of 0 are 4096 where it can, negative ones unlimited.
	Limits runner.Limits
	// AllowNetwork lets isolated actions that ask for network=external use the
	// worker's network, and Properties say so. Actions that are not isolated do in
	// any case.
	AllowNetwork bool
	// PersistentWorkers is how many tools each slot keeps running for actions that
	// are marked for that: see package persistent. They take a sandbox; without one,
	// such actions run as all others do. 0: none.
	PersistentWorkers int
	// PersistentIdle is how long a tool is kept running that has nothing to do. 0: 5
	// minutes.
	PersistentIdle time.Duration
	// Runner makes the runner of a slot, which closes it. It is trusted to run
	// commands, and to see to what they may do: UIDBase is of no account then.
	// nil: one that Isolation says, which has shown that it can run a command.
	Runner func(slot int) (runner.Runner, error)
	// Trace begins the span of an attempt to run a job, in the trace of the client's
	// build. What the attempt does, and asks of the storage, is within the context that
	// comes back. Default: there are no traces.
	Trace func(ctx context.Context, job *queuepb.Job, attempt uint32) (context.Context, trace.Span)
	// Logger gets what an operator should know. Default: discard.
	Logger *slog.Logger
	// Registerer takes the metrics. nil: there are none.
	Registerer prometheus.Registerer

	persistent *persistent.Metrics // by New

	slots     *allRunners
	sandboxed bool   // by settleIsolation, as note
	nobody    bool   // as whom actions run in a sandbox, in place of users of their slots; by settleIsolation
	note      string // why it is not, though it should be

	groups *cgroup.Tree // by settleLimits, as limitsNote; nil: there are none
	// asksProcesses says that Limits.Processes is no default.
	asksProcesses bool
	limitsNote    string // which default limit is not held, and why
}

func (o Options) withDefaults() (Options, error) {
	if o.Jobs == nil || o.Updates == nil || o.Store == nil || o.Actions == nil || o.Dir == "" {
		return o, errors.New("worker: Options need Jobs, Updates, Store, Actions and Dir")
	}
	return o.withExecutorDefaults()
}

// withExecutorDefaults is for those who have no queue.
func (o Options) withExecutorDefaults() (Options, error) {
	if o.Slots < 0 || o.DefaultTimeout < 0 || o.MaxTimeout < 0 || o.LeaseExtendEvery < 0 || o.MaxOutputBytes < 0 || o.PersistentWorkers < 0 || o.PersistentIdle < 0 {
		return o, errors.New("worker: negative limit")
	}
	if o.Slots > maxSlots {
		return o, fmt.Errorf("worker: %d slots, at most %d are possible: each has a process of its own", o.Slots, maxSlots)
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return o, fmt.Errorf("worker directory: %w", err)
	}
	o.Dir = dir
	if o.Name == "" {
		if o.Name, err = os.Hostname(); err != nil {
			o.Name = "localhost"
		}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if len(o.Pools) == 0 {
		o.Pools = []string{queue.DefaultPool}
	}
	o.Slots = cmp.Or(o.Slots, runtime.NumCPU())
	o.AnnounceAfter = cmp.Or(o.AnnounceAfter, 20*time.Millisecond)
	o.DefaultTimeout = cmp.Or(o.DefaultTimeout, time.Hour)
	o.LeaseExtendEvery = cmp.Or(o.LeaseExtendEvery, 10*time.Second)
	o.MaxOutputBytes = cmp.Or(o.MaxOutputBytes, 128<<20)
	o.UIDBase = cmp.Or(o.UIDBase, 65000)
	o.slots = &allRunners{}
	return o, nil
}

// maxSlots is more than any machine has CPUs for, and keeps the users of the
// slots, from 65000 on, away from 65534, which is nobody.
const maxSlots = 512

// Worker leases and runs jobs. Its methods are safe for concurrent use.
type Worker struct {
	o       Options
	metrics *workerMetrics
	lock    *os.File // of Dir
	abort   chan struct{}
	aborted sync.Once
	// state is what Ready says: nil when jobs are taken.
	state atomic.Pointer[error]
	slots []*slot // made by Run

	memory   *memory
	gate     *gate
	logged   string             // why no jobs are taken, as the log says, without figures; the gate's
	presence *presence.Presence // nil: nobody is told
	// faults counts the jobs in a row, of all slots, that failed by the worker's fault.
	faults atomic.Int32
}

// New prepares the directory. Run starts everything else; Close must be called
// in any case, after Run has returned.
func New(o Options) (*Worker, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := o.settleIsolation(); err != nil {
		return nil, err
	}
	if err := o.settleLimits(); err != nil {
		return nil, err
	}
	w, err := newWorker(o)
	if err != nil {
		return nil, errors.Join(err, o.closeLimits())
	}
	return w, nil
}

func newWorker(o Options) (*Worker, error) {
	o.offerNetwork()
	m, err := newMetrics(&o)
	if err != nil {
		return nil, err
	}
	if o.persistent, err = persistent.NewMetrics(o.Registerer); err != nil {
		return nil, err
	}
	w := &Worker{o: o, metrics: m, abort: make(chan struct{})}
	w.setState(errors.New("worker is not running"))
	if w.memory, err = newMemory("/", o.MinFreeMemoryBytes); err != nil {
		return nil, fmt.Errorf("worker: %w", err)
	}
	w.gate = newGate(w.machine, w.told)
	if o.Notices != nil {
		if w.presence, err = presence.New(presence.Options{
			Notices: o.Notices, Worker: o.Name, Pools: o.Pools, Properties: o.Properties, Slots: o.Slots, Logger: o.Logger,
		}); err != nil {
			return nil, err
		}
	}
	if w.lock, err = prepareDir(o.Dir); err != nil {
		return nil, fmt.Errorf("worker directory %s: %w", o.Dir, err)
	}
	return w, nil
}

// Slots is the number of actions at once.
func (w *Worker) Slots() int { return w.o.Slots }

// Ready returns nil while jobs are taken, and otherwise says why not.
func (w *Worker) Ready() error { return *w.state.Load() }

func (w *Worker) setState(err error) { w.state.Store(&err) }

// Abort makes Run kill what runs, hand the leases back, and return. It does not
// wait for that, and may be called at any time.
func (w *Worker) Abort() { w.aborted.Do(func() { close(w.abort) }) }

// Close ends the helpers and empties the directory.
func (w *Worker) Close() error {
	var all error
	for _, s := range w.slots {
		all = errors.Join(all, s.exec.close())
	}
	w.slots = nil
	return errors.Join(all, w.o.closeLimits(), emptyDir(w.o.Dir), w.lock.Close())
}

// Run leases and runs jobs until ctx is done, and returns nil when those that
// run then have ended, been reported and acknowledged. Each slot first runs a
// command that does nothing; if one can't, Run fails. It is called once.
func (w *Worker) Run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		select {
		case <-w.abort:
			stop()
		case <-ctx.Done():
		}
	}()
	defer func() {
		stop()
		<-heard
	}()
	return w.work(ctx)
}

// work is Run until ctx is done, which it is after Abort, too.
func (w *Worker) work(ctx context.Context) error {
	slots, err := w.start(ctx)
	w.slots = slots
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("worker %s can't run commands: %w", w.o.Name, err)
	}
	if len(w.o.Preflight) > 0 {
		for _, s := range slots {
			s.broken = true
			w.gate.fault(s.index, notYet)
		}
	}
	w.gate.begin(ctx)
	stopTelling := w.tell(ctx)
	gateCtx, stopGate := context.WithCancel(ctx)
	defer stopGate()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		w.gate.run(gateCtx)
		w.setState(errors.New("worker is draining"))
		if w.presence != nil {
			w.presence.Set(queuepb.WorkerState_DRAINING, "")
		}
	}()
	var group errgroup.Group
	for _, s := range slots {
		group.Go(func() error { return s.run(ctx) })
	}
	err = group.Wait()
	stopGate()
	<-watched
	w.setState(errors.New("worker has ended"))
	stopTelling()
	return err
}

// tell tells API servers of the worker until the function that it returns is
// called, which tells them that it is gone: after ctx is done, when what runs has
// ended.
func (w *Worker) tell(ctx context.Context) func() {
	if w.presence == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	told := make(chan struct{})
	go func() {
		defer close(told)
		w.presence.Run(ctx)
	}()
	return func() {
		cancel()
		<-told
	}
}

// announce has API servers know whether jobs are taken.
func (w *Worker) announce(reason string) {
	switch {
	case w.presence == nil:
	case reason == "":
		w.presence.Set(queuepb.WorkerState_TAKING, "")
	default:
		w.presence.Set(queuepb.WorkerState_PAUSED, reason)
	}
}

// running counts one action more, or fewer.
func (w *Worker) running(n int) {
	w.metrics.running.Add(float64(n))
	if w.presence != nil {
		w.presence.Add(n)
	}
}

// start makes the slots.
func (w *Worker) start(ctx context.Context) ([]*slot, error) {
	execs, err := newExecutors(ctx, w.o)
	var slots []*slot
	for i, e := range execs {
		slots = append(slots, &slot{w: w, index: i, exec: e, log: w.o.Logger.With("worker", w.o.Name, "slot", i)})
	}
	return slots, err
}

const lockName = "lock"

// prepareDir makes dir, takes it for this process, and empties it: whatever is
// in it was left by a worker that was killed.
func prepareDir(dir string) (*os.File, error) {
	// Others may pass, not look: the users of the slots have to get to theirs.
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close() //nolint:errcheck // nothing was written
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.New("another worker uses it")
		}
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := emptyDir(dir); err != nil {
		lock.Close() //nolint:errcheck // nothing was written
		return nil, err
	}
	return lock, nil
}
