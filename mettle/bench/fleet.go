package bench

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/digest"
)

// FleetOptions say how a fleet is measured whose workers run nothing: what API
// servers and the queue cost by themselves.
type FleetOptions struct {
	Options
	// Servers are the numbers of API servers that are measured, one after the
	// other.
	Servers []int
	// Start starts so many API servers and their workers. Required.
	Start func(ctx context.Context, servers int) (*RunningFleet, error)
}

// RunningFleet is servers that somebody has started for Fleet.
type RunningFleet struct {
	// Remotes are the addresses of the API servers, as in Options, each with a
	// storage of its own.
	Remotes []string
	// PIDs are their processes.
	PIDs []int
	// Workers says in words what works for them.
	Workers string
	// Stop ends them.
	Stop func() error
}

// Fleet measures fleets over their public API: the CPU and memory of API servers
// with idle workers, and for each of Concurrency the jobs a second, and the time
// from the publication of a job to its lease, as the workers' metadata tell it.
// Subjects, Remote and ServerPIDs of the Options are not used. It ends as Run
// does.
func Fleet(ctx context.Context, o FleetOptions) error {
	base, fn, err := o.withDefaults()
	if err != nil {
		return err
	}
	floors, err := startFloors(ctx)
	if err != nil {
		return fmt.Errorf("floor: %w", err)
	}
	defer floors.close()
	rep := newReport(base)
	rep.Remote = "fleet"
	for _, n := range o.Servers {
		if ctx.Err() != nil {
			break
		}
		f := fleet{runner: runner{o: base, floors: floors}, fn: fn}
		results, err := f.measure(ctx, n, o.Start)
		rep.Results = append(rep.Results, results...)
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("%d API servers: %w", n, err)
		}
	}
	rep.Interrupted = ctx.Err() != nil
	if err := rep.write(base.Out, base.JSON); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("interrupted: %w", context.Cause(ctx))
	}
	return rep.err()
}

// fleet measures so many API servers.
type fleet struct {
	runner
	fn      digest.Function
	clients []*client // one an API server
}

func (f *fleet) measure(ctx context.Context, n int, start func(context.Context, int) (*RunningFleet, error)) (rs []Result, err error) {
	_, _ = fmt.Fprintf(f.o.Progress, "starting %d API servers\n", n)
	running, err := start(ctx, n)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, running.Stop()) }()
	f.probe.pids = running.PIDs
	for _, remote := range running.Remotes {
		o := f.o
		o.Remote = remote
		c, err := dial(ctx, o, f.fn)
		if err != nil {
			return nil, err
		}
		defer c.close()
		f.clients = append(f.clients, c)
	}
	name := strconv.Itoa(n) + " API server"
	if n > 1 {
		name += "s"
	}
	name += ", " + running.Workers
	idle, err := f.idle(ctx, name)
	if err != nil {
		return nil, err
	}
	rs = append(rs, idle)
	var plan []scenario
	for _, clients := range f.o.Concurrency {
		w := &waits{}
		plan = append(plan, scenario{
			subject: "fleet", name: name, clients: clients, unit: "jobs/s", perOp: 1,
			floor: floorUnary, floorPerOp: 1, waits: w,
			prepare: func(ctx context.Context, _ *client) (op, error) { return f.prepare(ctx, w) },
		})
	}
	return append(rs, f.run(ctx, plan).Results...), nil
}

// idle is what the servers use while nobody asks for anything.
func (f *fleet) idle(ctx context.Context, name string) (Result, error) {
	_, _ = fmt.Fprintf(f.o.Progress, "fleet %s, idle\n", name)
	res := Result{Subject: "fleet", Case: name + ", idle", Unit: "cores"}
	before, err := f.probe.sample(ctx)
	if err != nil {
		return res, err
	}
	start := time.Now()
	select {
	case <-ctx.Done():
		return res, ctx.Err()
	case <-time.After(f.o.Duration):
	}
	res.Seconds = time.Since(start).Seconds()
	after, err := f.probe.sample(ctx)
	if err != nil {
		return res, err
	}
	res.Ops = 1 // it has a value
	res.Value = (after.cpu - before.cpu).Seconds() / res.Seconds
	res.Server = &ServerUsage{RSSBytes: after.rssBytes}
	return res, nil
}

// fleetActions is how many actions take turns: none is merged with another, as
// they are not to be cached, so few are enough.
const fleetActions = 256

// prepare is for actions that are in the servers' storage already and whose
// results are not cached. One op is an Execute to its end, at the servers in turn.
func (f *fleet) prepare(ctx context.Context, w *waits) (op, error) {
	actions, blobs, err := f.actions()
	if err != nil {
		return nil, err
	}
	for _, c := range f.clients {
		if err := errors.Join(c.needExecution(), c.upload(ctx, blobs...)); err != nil {
			return nil, err
		}
	}
	return func(ctx context.Context, n uint64) error {
		c := f.clients[n%uint64(len(f.clients))]
		got, err := c.execute(ctx, actions[n%fleetActions])
		if err != nil {
			return err
		}
		if got.at[queuedAt] == 0 || got.at[workerStart] == 0 {
			return answerError("execute: the metadata do not say when the job was queued and leased")
		}
		w.add(got.at[workerStart] - got.at[queuedAt])
		return nil
	}, nil
}

func (f *fleet) actions() (actions []digest.Digest, blobs []content, err error) {
	c := f.clients[0]
	root, err := c.message(&repb.Directory{})
	if err != nil {
		return nil, nil, err
	}
	blobs = append(blobs, root)
	for i := range fleetActions {
		m := trivialCommand("fleet", uint64(i)) //nolint:gosec // not negative
		m.Platform = c.platform
		cmd, err := c.message(m)
		if err != nil {
			return nil, nil, err
		}
		a, err := c.message(&repb.Action{
			CommandDigest: cmd.digest.Proto(), InputRootDigest: root.digest.Proto(), Platform: c.platform, DoNotCache: true,
		})
		if err != nil {
			return nil, nil, err
		}
		actions = append(actions, a.digest)
		blobs = append(blobs, cmd, a)
	}
	return actions, blobs, nil
}

// waits are durations of jobs that their metadata tell, such as how long they
// waited for a worker. It is safe for concurrent use.
type waits struct {
	mu   sync.Mutex
	hist histogram
}

func (w *waits) add(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hist.add(d)
}

// reset forgets what was added, as by the warm-up.
func (w *waits) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hist = histogram{}
}

// latency is of what was added; nil of nothing.
func (w *waits) latency() *Latency {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.hist.n == 0 {
		return nil
	}
	return latencyOf(&w.hist)
}
