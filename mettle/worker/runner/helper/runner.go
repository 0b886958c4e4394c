//go:build linux

// Package helper is what the ways of running commands share: a process for each
// slot, this program started again, that starts commands, waits for them, and
// kills what they leave behind. runner/bare and runner/sandbox call it, each with
// its own Setting; no one else does.
//
// The helper is there for three reasons. The worker itself never forks while it
// runs, so no child of it can hold open for writing a file that the worker is
// making, which would let the exec of that file fail with ETXTBSY (golang/go#22315).
// The helper is a child subreaper, or the init of a PID namespace: what a command
// leaves behind, daemons that forked twice and left the session included, becomes
// a child of the helper, which kills its children until there are none. And when
// the worker dies, however it dies, the helper reads the end of its socket, kills
// what runs, and leaves. The helper itself is in its own session, so that a Ctrl-C
// at the terminal lets the worker drain.
//
// It needs Linux, with /proc.
package helper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// Options say how commands run.
type Options struct {
	// Name is what the helper is called: its main finds itself by it.
	Name string
	// Config is for the helper's Setting, in a form of its own.
	Config string
	// Attr, if set, is how the helper is started: its namespaces.
	Attr *syscall.SysProcAttr
	// User, if set, is whom commands run as, without supplementary groups. It
	// takes root to set it.
	User User
	// KillTimeout bounds the time to kill what a command leaves behind; where
	// that doesn't do, Run fails. Default 10 s: enough for thousands of
	// processes, too short for one that hangs in the kernel.
	KillTimeout time.Duration
	// Bounds are what commands are held to. The zero Bounds bound nothing.
	Bounds Bounds
	// Streams, if set, are those of the one command that the Runner runs.
	Streams *runner.Streams
	// Logger gets what goes wrong with the helper. Default: discard.
	Logger *slog.Logger
}

// User is a user and a group, by number. The zero User is that of the worker.
type User struct {
	Set      bool
	UID, GID int
}

// ErrLeftovers: processes of a command could not be killed.
var ErrLeftovers = errors.New("processes of the command could not be killed")

// Runner implements runner.Runner. It is used by one goroutine at a time.
type Runner struct {
	opts   Options
	helper *helperProcess // nil: none was started yet, or the last one broke
	seq    uint64
	buf    []byte
}

var _ runner.Runner = (*Runner)(nil)

// DefaultKillTimeout is that of Options.
const DefaultKillTimeout = 10 * time.Second

// New starts a Runner.
func New(opts Options) (*Runner, error) {
	if opts.KillTimeout == 0 {
		opts.KillTimeout = DefaultKillTimeout
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Runner{opts: opts}
	if err := r.ensureHelper(); err != nil {
		return nil, errors.Join(err, opts.Bounds.Group.Close())
	}
	return r, nil
}

func (r *Runner) ensureHelper() error {
	if r.helper != nil {
		return nil
	}
	h, err := startHelper(r.opts)
	if err != nil {
		return fmt.Errorf("start the helper that runs commands: %w", err)
	}
	r.helper = h
	return nil
}

// Close implements runner.Runner.
func (r *Runner) Close() error {
	return errors.Join(r.endHelper(), r.opts.Bounds.Group.Close())
}

func (r *Runner) endHelper() error {
	h := r.helper
	r.helper = nil
	if h == nil {
		return nil
	}
	return h.close(r.opts.KillTimeout + time.Second)
}

// drop gives up a helper that can't be trusted any more.
func (r *Runner) drop() {
	if err := r.endHelper(); err != nil {
		r.opts.Logger.Warn("the helper that runs commands did not end by itself", "error", err)
	}
	r.opts.Bounds.Group.Kill() // what it left, if it was killed
}

// Output sizes are looked at only while a command runs for longer than
// firstCheck, so that short ones don't pay for it, and then every nextCheck.
// Between two looks a command can write a few gigabytes at most.
const (
	firstCheck = 200 * time.Millisecond
	nextCheck  = time.Second
)

// Run implements runner.Runner.
func (r *Runner) Run(ctx context.Context, spec runner.Spec) (runner.Result, error) {
	if err := context.Cause(ctx); err != nil {
		return runner.Result{}, fmt.Errorf("command not started: %w", err)
	}
	if r.opts.Streams != nil && (r.seq > 0 || r.helper == nil) {
		return runner.Result{}, runner.ErrUsed
	}
	if err := r.ensureHelper(); err != nil {
		return runner.Result{}, err
	}
	r.seq++
	r.buf = appendRequest(r.buf[:0], r.seq, &spec)
	if _, err := r.helper.conn.Write(r.buf); err != nil {
		r.drop()
		return runner.Result{}, fmt.Errorf("hand the command to the helper: %w", err)
	}
	if cap(r.buf) > 1<<20 {
		r.buf = nil
	}
	rep, tooLarge, err := r.await(ctx, &spec)
	if err != nil {
		r.drop()
		return runner.Result{}, fmt.Errorf("wait for the helper: %w", err)
	}
	if rep.outcome != outcomeFailed && rep.message != "" {
		rep.result.Notes = strings.Split(rep.message, "\n")
	}
	if rep.disturbed {
		r.opts.Logger.Warn("a command has changed the limits or the priority of the helper that runs commands, of which there is another now")
		r.drop()
	}
	switch {
	case rep.outcome == outcomeLeftovers:
		r.drop()
		return rep.result, fmt.Errorf("%w within %v", ErrLeftovers, r.opts.KillTimeout)
	case rep.outcome == outcomeFailed:
		return runner.Result{}, fmt.Errorf("start the command: %s", rep.message)
	case rep.killed && tooLarge, isOver(&spec, rep.result.StdoutBytes, rep.result.StderrBytes):
		return rep.result, fmt.Errorf("%w: over %d bytes", runner.ErrOutputTooLarge, spec.MaxOutputBytes)
	case rep.killed:
		return rep.result, fmt.Errorf("command killed: %w", context.Cause(ctx))
	case rep.ended == endedByMemory:
		return rep.result, fmt.Errorf("%w: it may use %s", runner.ErrOutOfMemory, bytesText(r.opts.Bounds.Limits.MemoryBytes))
	case rep.ended == endedByDisk:
		return rep.result, fmt.Errorf("%w: it may write %s", runner.ErrDiskQuota, bytesText(r.opts.Bounds.Limits.DiskBytes))
	case rep.ended == endedByMachine:
		return rep.result, errors.New(rep.message)
	}
	return rep.result, nil
}

// answerTimeout is how long a helper may take to say that it has killed a
// command, beside the time to kill it: enough on a machine that is swapping.
const answerTimeout = 5 * time.Second

// await waits for the reply to the request r.seq, and has the command killed
// when ctx is done or its output is too large.
func (r *Runner) await(ctx context.Context, spec *runner.Spec) (rep reply, tooLarge bool, err error) {
	h, seq := r.helper, r.seq
	// A helper that is told to kill and does not answer is killed itself: a
	// command of the same user can stop it.
	deaf := time.AfterFunc(math.MaxInt64, func() { _ = h.process.Kill() })
	defer deaf.Stop()
	kill := func() {
		deaf.Reset(r.opts.KillTimeout + answerTimeout)
		h.kill(seq)
	}
	if ctx.Done() != nil {
		killed := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			defer close(killed)
			kill()
		})
		defer func() {
			if !stop() {
				<-killed
			}
		}()
	}
	check := firstCheck
	for {
		deadline := time.Time{}
		if spec.MaxOutputBytes > 0 && !tooLarge {
			deadline = time.Now().Add(check)
			check = nextCheck
		}
		if err := h.conn.SetReadDeadline(deadline); err != nil {
			return reply{}, false, err
		}
		rep, err := h.readReply()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if isOver(spec, sizeOf(spec.Stdout), sizeOf(spec.Stderr)) {
				tooLarge = true
				kill()
			}
		case err != nil:
			return reply{}, false, err
		case rep.seq == seq:
			return rep, tooLarge, nil
		}
	}
}

func isOver(spec *runner.Spec, stdout, stderr int64) bool {
	return spec.MaxOutputBytes > 0 && (stdout > spec.MaxOutputBytes || stderr > spec.MaxOutputBytes)
}

func sizeOf(file string) int64 {
	if st, err := os.Lstat(file); err == nil {
		return st.Size()
	}
	return 0 // not created yet
}
