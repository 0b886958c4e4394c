//go:build linux

// Package persistent keeps tools running between actions, those that speak Bazel's
// worker protocol: a compiler that is warm answers in a fraction of the time that a
// new one takes. It finds out which actions are marked for that (Of), starts the tool
// in a sandbox of its own, places each action's inputs where the tool sees them, asks,
// and clears all away again but the tool's own files (Pool). It does not collect
// outputs and knows no queue: its caller is the worker's Executor, which runs an
// action plainly where Do says so, because every such tool can do that, too.
//
// # What is told from what
//
// A process serves actions of one instance whose command line without flag files,
// environment, working directory, place, protocol and tool files are the same; what
// the client calls its tool (persistentWorkerKey) counts beside that, never instead.
// The tool's files are those that the client has marked (bazel_tool_input). Where it
// has marked none, they are the inputs that the command line names, flag files
// aside, and the program's runfiles.
//
// # What lives on
//
// The process, its memory, its /tmp, and the tool's files. All else in its root goes
// before the next action comes: a process that is found to have changed or added
// files meanwhile is ended, as is one that writes to its stdout unasked. Because it
// may still hold files and directories open, nothing that it had in hand is used
// again, neither as a directory of another input root nor, without a copy, as a blob.
//
// # What goes wrong
//
// A process that ends, answers with something else than one response, or can't be
// given its inputs is ended, and the action goes to a new one, once. If that fails,
// too, Do says that the action is to run plainly. Where new processes fail at once, so
// do further actions with that tool for a while. So the result is always one that a
// plain run or a well-behaved process gives. When the action's time is over, or nobody
// wants its result, the process is killed at once; the protocol's cancel requests are
// not used, nor more than one request at a time.
package persistent

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/command"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// ErrPlain: the action is to run without a persistent worker. The rest of the error
// says why.
var ErrPlain = errors.New("not run in a persistent worker")

// ErrTimeout: the action took longer than it may.
var ErrTimeout = errors.New("timeout")

// Options are those of New.
type Options struct {
	// Dir is a directory of the pool's own, which New makes. Required.
	Dir string
	// Owner is whom processes run as.
	Owner inputroot.Owner
	// MaxProcesses is how many are kept at a time; when another is needed, the one
	// that was used least recently goes. 0: 1.
	MaxProcesses int
	// Idle is how long a process is kept that nobody uses. 0: 5 minutes.
	Idle time.Duration
	// MaxResponseBytes bounds a response. 0: 16 MiB.
	MaxResponseBytes int64
	// Metrics may be nil.
	Metrics *Metrics
	// Logger gets what goes wrong with a process. Default: discard.
	Logger *slog.Logger
}

// Pool has the processes of one slot. Do and Clean are called by one goroutine;
// Shrink and Close may be called at any time.
type Pool struct {
	o    Options
	busy *process // between Do and Clean
	made int

	// failed are the tools whose last processes failed at their first request.
	failed map[key]failed

	mu     sync.Mutex
	idle   []*process // the one used last at the end; guarded by mu
	closed bool       // guarded by mu
	ending sync.WaitGroup
}

// New makes the directory of a Pool.
func New(o Options) (*Pool, error) {
	if o.Dir == "" || o.MaxProcesses < 0 || o.Idle < 0 || o.MaxResponseBytes < 0 {
		return nil, errors.New("persistent workers: Options need a Dir, and no negative limits")
	}
	o.MaxProcesses = cmp.Or(o.MaxProcesses, 1)
	o.Idle = cmp.Or(o.Idle, 5*time.Minute)
	o.MaxResponseBytes = cmp.Or(o.MaxResponseBytes, 16<<20)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = newMetrics()
	}
	if err := os.Mkdir(o.Dir, 0o700); err != nil {
		return nil, err
	}
	return &Pool{o: o, failed: make(map[key]failed)}, nil
}

// Request is one action.
type Request struct {
	Tool    *Tool
	Command *repb.Command
	// Instance and Place are told apart, whatever they are: the same process never
	// serves two.
	Instance, Place string
	// Root is the digest of the input root, of which Inputs knows.
	Root   digest.Digest
	Inputs *Inputs
	// Directories are made where the input root does not have them: see
	// inputroot.Request.
	Directories []string
	// Timeout bounds the time from when the inputs are there to the answer, of all
	// processes that are asked. Required.
	Timeout time.Duration
	// Start makes the runner of a new process, which the Pool closes.
	Start func(*runner.Streams) (runner.Runner, error)
}

// Result is what came of an action.
type Result struct {
	// Root is the directory where the outputs are, until Clean. Unless the process
	// has ended, they can still change.
	Root string
	// ExitCode and Output are the tool's.
	ExitCode int
	Output   string
	// Fetched is when the inputs were there, and Start and End bound the request.
	Fetched, Start, End time.Time
	// Spent is how much of the timeout is gone.
	Spent time.Duration
	// Before counts the requests that the process had answered before this one, and
	// Failures the processes that have failed at this one.
	Before   int64
	Failures int
}

// key tells processes apart.
type key [sha256.Size]byte

func (r *Request) key(in *inputs) key {
	h := sha256.New()
	add := func(ss ...string) {
		_, _ = h.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(ss))))
		for _, s := range ss {
			_, _ = h.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(s))))
			_, _ = h.Write([]byte(s))
		}
	}
	add(r.Instance, r.Place, r.Tool.Key, string(r.Tool.Protocol), command.WorkingDirectory(r.Command), in.tool.String())
	add(r.Tool.Startup...)
	add(environment(r.Command)...)
	return key(h.Sum(nil))
}

func environment(c *repb.Command) []string {
	env := make([]string, len(c.GetEnvironmentVariables()))
	for i, v := range c.GetEnvironmentVariables() {
		env[i] = v.Name + "=" + v.Value
	}
	return env
}

const (
	// maxFailures is how many processes an action is given to.
	maxFailures = 2
	// shunFor is how long a tool is not tried again of which so many in a row failed at
	// their first request, and maxShunned how many such tools are remembered.
	shunFor    = 5 * time.Minute
	maxShunned = 64
)

// Do runs an action. The error wraps ErrPlain, ErrTimeout or ctx's cause. With the
// first two comes a Result: what is in its root is then what a process left that was
// killed. Clean follows in any case.
func (p *Pool) Do(ctx context.Context, req Request) (*Result, error) {
	in, err := req.Inputs.split(ctx, &req)
	if err != nil {
		return &Result{}, plain(ctx, err)
	}
	defer req.Inputs.release(in)
	k := req.key(in)
	if f := p.failed[k]; f.processes >= maxFailures && time.Since(f.last) < shunFor {
		return &Result{}, plain(ctx, errors.New("this tool has failed as one a short while ago"))
	}
	var spent time.Duration
	for failures := 0; ; {
		res, err := p.try(ctx, attempt{&req, in, k, req.Timeout - spent})
		spent += res.Spent
		res.Spent, res.Failures = spent, failures
		switch {
		case err == nil:
			delete(p.failed, k)
			return res, nil
		case context.Cause(ctx) != nil, !errors.Is(err, errProcess):
			return res, plain(ctx, err)
		case errors.Is(err, ErrTimeout):
			return res, err
		}
		failures++
		p.note(k, res)
		p.o.Logger.Warn("a persistent worker failed", "tool", req.Tool.Startup[0], "failures", failures, "error", err)
		if failures == maxFailures {
			return res, plain(ctx, err)
		}
	}
}

func plain(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return fmt.Errorf("%w: %w", cause, err)
	}
	return fmt.Errorf("%w: %w", ErrPlain, err)
}

// failed is how many processes of a tool in a row have failed at their first request.
type failed struct {
	processes int
	last      time.Time
}

// note notes the failure of a process. One that had served before says nothing of its
// tool: it may be the action that is too much for it.
func (p *Pool) note(k key, res *Result) {
	if res.Before > 0 {
		return
	}
	if len(p.failed) >= maxShunned {
		clear(p.failed)
	}
	p.failed[k] = failed{processes: p.failed[k].processes + 1, last: time.Now()}
}

// attempt is what try has to do.
type attempt struct {
	req     *Request
	in      *inputs
	key     key
	timeout time.Duration
}

// try gives the action to one process. If the error wraps errProcess, that has ended.
func (p *Pool) try(ctx context.Context, a attempt) (res *Result, err error) {
	if p.busy != nil {
		p.end(p.busy, reasonFailed) // the one before
		p.busy = nil
	}
	res = &Result{}
	proc := p.take(a.key)
	began := time.Now()
	if proc == nil {
		if proc, err = p.start(ctx, a); err != nil {
			return res, err
		}
	}
	p.busy = proc
	res.Root, res.Before = proc.root, proc.answered
	defer func() {
		res.End = time.Now()
		if errors.Is(err, errProcess) {
			proc.stop() // Clean removes it
			proc.reason = reasonFailed
			if context.Cause(ctx) != nil || errors.Is(err, ErrTimeout) {
				proc.reason = reasonKilled
			}
			err = proc.explain(err)
		}
	}()
	if err := proc.place(ctx, a.req, a.in); err != nil {
		return res, err
	}
	res.Fetched, res.Start = time.Now(), time.Now()
	if res.Before == 0 {
		res.Start = began // the start of the tool is part of it, if not of the fetch
	}
	defer func() { res.Spent = time.Since(res.Fetched) }()
	askCtx, stop := context.WithTimeoutCause(ctx, a.timeout, ErrTimeout)
	defer stop()
	resp, err := proc.ask(askCtx, a.req, a.in)
	if err != nil {
		return res, err
	}
	p.o.Metrics.answered(proc.answered)
	proc.answered++
	res.ExitCode, res.Output = int(resp.GetExitCode()), resp.GetOutput()
	return res, nil
}

// take takes an idle process that lives.
func (p *Pool) take(k key) *process {
	for {
		p.mu.Lock()
		i := slices.IndexFunc(p.idle, func(x *process) bool { return x.key == k })
		if i < 0 {
			p.mu.Unlock()
			return nil
		}
		proc := p.idle[i]
		p.idle = slices.Delete(p.idle, i, i+1)
		proc.expiry.Stop()
		p.mu.Unlock()
		err := proc.quiet()
		if err == nil {
			return proc
		}
		p.o.Logger.Warn("a persistent worker failed while it had nothing to do", "error", proc.explain(err))
		if errors.Is(err, errChanged) {
			p.end(proc, reasonChanged)
		} else {
			p.end(proc, reasonFailed)
		}
	}
}

// start starts a process, for which another makes room if need be.
func (p *Pool) start(ctx context.Context, a attempt) (*process, error) {
	p.mu.Lock()
	var oldest *process
	closed := p.closed
	if len(p.idle) >= p.o.MaxProcesses {
		oldest = p.idle[0]
		p.idle = slices.Delete(p.idle, 0, 1)
		oldest.expiry.Stop()
	}
	p.mu.Unlock()
	if oldest != nil {
		p.end(oldest, reasonEvicted)
	}
	if closed {
		return nil, errors.New("the worker ends")
	}
	p.made++
	proc := &process{key: a.key, dir: filepath.Join(p.o.Dir, strconv.Itoa(p.made)), owner: p.o.Owner, maxResponse: p.o.MaxResponseBytes}
	if err := proc.start(ctx, a.req, a.in); err != nil {
		proc.stop()
		return nil, errors.Join(err, proc.remove())
	}
	p.o.Metrics.started()
	return proc, nil
}

// end ends a process that is in no list.
func (p *Pool) end(proc *process, r reason) {
	proc.stop()
	if proc.reason != "" {
		r = proc.reason
	}
	p.o.Metrics.ended(r)
	if err := proc.remove(); err != nil {
		p.o.Logger.Warn("the directory of a persistent worker could not be removed", "error", err)
	}
}

// Drop ends the process of the last action, whose outputs turned out to be of no use.
func (p *Pool) Drop() {
	if p.busy != nil {
		p.end(p.busy, reasonFailed)
		p.busy = nil
	}
}

// Clean removes what the last action has left where its process sees it, so that the
// next one may have the process; or ends the process where that can't be done.
func (p *Pool) Clean() {
	proc := p.busy
	p.busy = nil
	if proc == nil {
		return
	}
	if proc.reason != "" {
		p.end(proc, proc.reason)
		return
	}
	if err := proc.clean(); err != nil {
		p.o.Logger.Warn("a persistent worker is ended", "error", err)
		p.end(proc, reasonChanged)
		return
	}
	p.mu.Lock()
	closed := p.closed
	if !closed {
		p.idle = append(p.idle, proc)
		proc.expiry = time.AfterFunc(p.o.Idle, func() { p.expire(proc) })
	}
	p.mu.Unlock()
	if closed {
		p.end(proc, reasonClosed)
	}
}

// expire ends a process that nobody has used for a while.
func (p *Pool) expire(proc *process) {
	p.mu.Lock()
	i := slices.Index(p.idle, proc)
	if i >= 0 {
		p.idle = slices.Delete(p.idle, i, i+1)
		p.ending.Add(1)
	}
	p.mu.Unlock()
	if i >= 0 {
		defer p.ending.Done()
		p.end(proc, reasonIdle)
	}
}

// Shrink ends the processes that have nothing to do, because what they have is needed.
// The function that it returns waits for that.
func (p *Pool) Shrink() (wait func()) { return p.endIdle(reasonMemory) }

func (p *Pool) endIdle(r reason) (wait func()) {
	var all sync.WaitGroup
	for _, proc := range p.drain() {
		all.Go(func() {
			defer p.ending.Done()
			p.end(proc, r)
		})
	}
	return all.Wait
}

// drain takes all idle processes, each of which is one of p.ending.
func (p *Pool) drain() []*process {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.idle
	p.idle = nil
	for _, proc := range all {
		proc.expiry.Stop()
	}
	p.ending.Add(len(all))
	return all
}

// Close ends all processes. It is called when neither Do nor Clean runs.
func (p *Pool) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.endIdle(reasonClosed)()
	if p.busy != nil {
		p.end(p.busy, reasonClosed)
		p.busy = nil
	}
	p.ending.Wait()
	return inputroot.Remove(p.o.Dir)
}
