//go:build linux

package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	workerpb "github.com/mettle-build/mettle/proto/worker"
)

// A worker that is broken fails its jobs at once, and so draws all others to it.
// So one that has failed a job by its own fault takes no other before it has
// shown that it works: the gate is shut, the job handed back to another worker,
// and the slot's preflight run until it passes. The client hears of it only when
// the job's attempts are used up.

// maxFaultsInRow is how many jobs in a row may fail, of all slots together, though
// each time the preflight passed; where there are more slots, as many as those.
// Past it the gate stays shut for a while each time: something is wrong that the
// preflight does not find.
const maxFaultsInRow = 3

const (
	// storeTimeout bounds the question whether the store is there.
	storeTimeout = 5 * time.Second
	// preflightTimeout bounds Options.Preflight.
	preflightTimeout = time.Minute
	// maxPause is the longest wait for what the preflight does not find.
	maxPause = 30 * time.Second
	// maxRetry is the longest wait between two preflights.
	maxRetry = 10 * time.Second
)

// fault hands the job of a lease back, because this worker can't run it. Where
// that is because the store is away, for everybody, it is no failed attempt.
func (s *slot) fault(ctx context.Context, lease queue.Lease, reason string) {
	s.broken = true
	s.jobLog(lease).Error("a job failed by this worker's fault, it goes back to the queue", "error", reason)
	// First the gate, or another slot here would get the job.
	s.w.gate.fault(s.index, short("a job failed by this worker's fault: "+reason))
	if err := s.storeIsThere(ctx); errors.Is(err, blob.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) {
		s.w.metrics.actions.WithLabelValues("released").Inc()
		s.release(ctx, lease)
		return
	}
	s.faults++
	s.w.faults.Add(1)
	s.w.metrics.actions.WithLabelValues("rejected").Inc()
	s.reject(ctx, lease, short(reason))
}

// failedByDisk returns an error where a command has failed while there is no room
// here: it may well be why, and a build is not to break by it. An action that
// fills the disk by itself ends when its attempts are used up, and its client
// hears of the disk.
func (s *slot) failedByDisk(resp *repb.ExecuteResponse) error {
	if resp.GetStatus().GetCode() != 0 || resp.GetResult().GetExitCode() == 0 || usageIn(resp).GetEnded() != workerpb.ResourceUsage_BY_ITSELF {
		return nil
	}
	err := s.w.o.checkDisk()
	if err != nil {
		err = fmt.Errorf("the command ended with %d, and %w", resp.GetResult().GetExitCode(), err)
	}
	return err
}

// maxReasonBytes bounds what is told of a reason.
const maxReasonBytes = 300

// short is the beginning of a reason, on one line.
func short(reason string) string {
	reason = strings.ToValidUTF8(strings.Join(strings.Fields(reason), " "), "?")
	if len(reason) <= maxReasonBytes {
		return reason
	}
	cut := maxReasonBytes
	for !utf8.RuneStart(reason[cut]) {
		cut--
	}
	return reason[:cut] + "..."
}

// recover has a slot that has failed show that it works, and then lets the worker
// take jobs again, if nothing else is against it.
func (s *slot) recover(ctx context.Context) {
	if !s.broken {
		s.backOff(ctx)
		return
	}
	for n := 0; ; n++ {
		err := s.preflight(ctx)
		if err == nil {
			break
		}
		if s.isOver(ctx) {
			return
		}
		s.w.gate.fault(s.index, short("preflight: "+err.Error()))
		s.sleep(ctx, min(100*time.Millisecond<<min(n, 10), maxRetry))
	}
	s.broken = false
	if n, limit := int(s.w.faults.Load()), max(maxFaultsInRow, s.w.o.Slots); n >= limit {
		s.w.gate.fault(s.index, fmt.Sprintf("the last %d jobs failed by this worker's fault, though its preflight passes", n))
		s.sleep(ctx, pauseAfter(n-limit))
		s.w.gate.mend(s.index)
		return
	}
	s.w.gate.mend(s.index)
	s.backOff(ctx)
}

// pauseAfter is how long no job is taken after so many faults more than are borne.
// It is the worker's, not a slot's, or one with many slots would fail hundreds of
// jobs before each of them has learned to wait.
func pauseAfter(more int) time.Duration {
	return min(500*time.Millisecond<<min(more, 10), maxPause)
}

// isOver reports whether the slot is to end.
func (s *slot) isOver(ctx context.Context) bool {
	select {
	case <-s.w.abort:
		return true
	default:
		return ctx.Err() != nil
	}
}

// preflight finds out whether the slot can run an action.
func (s *slot) preflight(ctx context.Context) error {
	if err := s.storeIsThere(ctx); err != nil {
		return fmt.Errorf("the storage does not answer: %w", err)
	}
	return s.exec.preflight(ctx)
}

// storeIsThere asks the store for a blob that nobody has; any answer will do.
func (s *slot) storeIsThere(ctx context.Context) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errPanic, p)
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	_, err = s.w.o.Store.FindMissing(ctx, []digest.Digest{digest.Of(digest.SHA256, []byte("is the store there?"))})
	return err
}

// A prober is a runner that can tell whether commands run here at all.
type prober interface {
	Probe(ctx context.Context, dir string) error
}

// preflight finds out whether commands run, and whether the operator's own does,
// where there is one. The slot is clean before, and after.
func (e *Executor) preflight(ctx context.Context) error {
	if err := e.probe(ctx); err != nil || len(e.o.Preflight) == 0 {
		return err
	}
	return e.inRoot(func() error { return e.ownPreflight(ctx) })
}

// probe runs a command that does nothing, as actions run.
func (e *Executor) probe(ctx context.Context) error {
	p, ok := e.runners.usual.(prober)
	if !ok {
		return nil
	}
	return e.inRoot(func() error { return p.Probe(ctx, e.root()) })
}

// inRoot calls f with an empty input root.
func (e *Executor) inRoot(f func() error) error {
	if err := e.shelf.Vacate(); err != nil {
		return err
	}
	if err := os.Mkdir(e.root(), 0o755); err != nil {
		return err
	}
	defer inputroot.Remove(e.root()) //nolint:errcheck // what can't be removed fails the next one
	if e.owner.Set {
		if err := os.Chown(e.root(), e.owner.UID, e.owner.GID); err != nil {
			return err
		}
	}
	return f()
}

// ownPreflight runs the operator's command.
func (e *Executor) ownPreflight(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, preflightTimeout)
	defer cancel()
	out, errs := filepath.Join(e.dir, "preflight.stdout"), filepath.Join(e.dir, "preflight.stderr")
	defer os.Remove(out)  //nolint:errcheck // the directory is cleaned at each start
	defer os.Remove(errs) //nolint:errcheck // likewise
	res, err := e.runners.usual.Run(ctx, runner.Spec{
		Args: e.o.Preflight, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Root: e.root(), Dir: e.root(), Stdout: out, Stderr: errs, MaxOutputBytes: 1 << 20,
	})
	if err != nil {
		return fmt.Errorf("command %q: %w", e.o.Preflight, err)
	}
	if res.ExitCode != 0 {
		message, _ := os.ReadFile(errs)
		return fmt.Errorf("command %q: exit code %d: %s", e.o.Preflight, res.ExitCode, message)
	}
	return nil
}
