//go:build linux

package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/mettle/worker/image"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
	"github.com/mettle-build/mettle/mettle/worker/output"
	"github.com/mettle-build/mettle/mettle/worker/persistent"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
	persistentpb "github.com/mettle-build/mettle/proto/persistent"
)

// keepsTools reports whether tools are kept running. Without a sandbox, one would be
// among the processes of the slot's other actions, and could do to them what it likes.
func (o *Options) keepsTools() bool {
	return o.PersistentWorkers > 0 && o.sandboxed && o.Runner == nil
}

// withoutAdoption is a store that takes over no files: those of a process that lives
// on could be written to after that.
type withoutAdoption struct{ blob.Store }

// forPersistent makes what of a station is for persistent workers.
func (s *station) forPersistent(policy inputroot.LinkPolicy) (err error) {
	if s.inputs, err = persistent.NewInputs(s.store, policy); err != nil {
		return err
	}
	s.copier, err = output.New(output.Options{Store: withoutAdoption{s.store}})
	return err
}

// makePersistent makes the slot's pool of tools, if tools are kept.
func (e *Executor) makePersistent(user helper.User) (err error) {
	if !e.o.keepsTools() {
		return nil
	}
	e.persistent, err = persistent.New(persistent.Options{
		Dir: filepath.Join(e.dir, persistentName), Owner: e.owner, MaxProcesses: e.o.PersistentWorkers, Idle: e.o.PersistentIdle,
		MaxResponseBytes: min(e.o.MaxOutputBytes, maxAnswerBytes), Metrics: e.o.persistent, Logger: e.o.Logger,
	})
	if err == nil {
		e.toolUser = user
		e.o.slots.addTools(e.persistent)
	}
	return err
}

// startTool makes the runner of a tool of r, in an image if r asks for one.
func (e *Executor) startTool(ctx context.Context, r *run, streams *runner.Streams) (runner.Runner, error) {
	t := &toolRunner{}
	var layers []string
	if r.image != (image.Reference{}) {
		var err error
		if t.image, err = e.pull(ctx, r.image); err != nil {
			return nil, err
		}
		layers = t.image.Layers
	}
	var err error
	if t.Runner, err = e.o.makeRunner(e.toolUser, e.o.sandbox(e.toolUser, r.place, layers), streams); err != nil {
		t.closeImage()
		return nil, err
	}
	return t, nil
}

// toolRunner is a runner with the image that it is in, which stays as long as it.
type toolRunner struct {
	runner.Runner
	image *image.Image // nil: none
}

func (t *toolRunner) Close() error {
	err := t.Runner.Close()
	t.closeImage()
	return err
}

func (t *toolRunner) closeImage() {
	if t.image != nil {
		t.image.Close()
	}
}

// maxAnswerBytes bounds what a tool answers, which is in memory.
const maxAnswerBytes = 16 << 20

func (e *Executor) closePersistent() error {
	if e.persistent == nil {
		return nil
	}
	return e.persistent.Close()
}

// cleanPersistent removes what the last action has left with a tool.
func (e *Executor) cleanPersistent() error {
	if e.persistent == nil || !e.answered {
		return nil
	}
	e.persistent.Clean()
	e.answered = false
	return inputroot.Remove(e.answer())
}

// answer is the file for what a tool answered.
func (e *Executor) answer() string { return filepath.Join(e.dir, answerName) }

// findTool finds out whether the action is one for a tool that is kept running.
func (e *Executor) findTool(r *run) (err error) {
	if e.persistent == nil {
		return nil
	}
	if r.tool, err = persistent.Of(platformOf(r.action, r.command), r.command); errors.Is(err, persistent.ErrPlain) {
		r.notes = append(r.notes, err.Error())
		return nil
	}
	return err
}

// attemptPersistent is attempt by a tool that is kept running. If the error wraps
// persistent.ErrPlain, the action is to run as others do, in what is left of its time.
func (e *Executor) attemptPersistent(ctx context.Context, r *run) (*repb.ExecuteResponse, error) {
	m := r.metadata
	m.InputFetchStartTimestamp = r.clock.stamp()
	if r.image != (image.Reference{}) {
		img, err := e.pull(ctx, r.image)
		if err != nil {
			return nil, err
		}
		defer img.Close()
		r.isIn(img)
	}
	e.answered = true
	got, err := e.persistent.Do(ctx, persistent.Request{
		Tool: r.tool, Command: r.command, Instance: r.job.GetInstanceName(), Place: fmt.Sprintf("%+v", r.place),
		Root: r.inputs, Inputs: r.at.inputs, Directories: directories(r.command), Timeout: r.timeout,
		Start: func(s *runner.Streams) (runner.Runner, error) { return e.startTool(ctx, r, s) },
	})
	switch {
	case errors.Is(err, persistent.ErrTimeout):
		err = fmt.Errorf("%w: the command ran for longer than %v, and the process was killed: %w", errTimeout, r.timeout, err)
	case errors.Is(err, persistent.ErrPlain):
		r.timeout = max(r.timeout-got.Spent, time.Millisecond)
		return nil, err
	case err != nil:
		return nil, err
	}
	m.InputFetchCompletedTimestamp = r.clock.stampAt(got.Fetched)
	m.ExecutionStartTimestamp = r.clock.stampAt(got.Start)
	m.ExecutionCompletedTimestamp = r.clock.stampAt(got.End)
	m.VirtualExecutionDuration = durationpb.New(max(0, got.End.Sub(got.Start)))
	between(ctx, spanFetch, m.InputFetchStartTimestamp, m.InputFetchCompletedTimestamp)
	between(ctx, spanRun, m.ExecutionStartTimestamp, m.ExecutionCompletedTimestamp)
	if e := r.tell(got); e != nil {
		return nil, e
	}
	res := runner.Result{ExitCode: got.ExitCode, Start: got.Start, End: got.End, StderrBytes: int64(len(got.Output))}
	if res.StderrBytes > 0 {
		// As Bazel does: the answer is what there is to tell the user.
		if err := os.WriteFile(e.answer(), []byte(got.Output), 0o600); err != nil {
			return nil, err
		}
	}
	resp, err := e.collect(ctx, r, ran{collector: r.at.copier, root: got.Root, stderr: e.answer(), result: res, err: err})
	if resp == nil && context.Cause(ctx) == nil {
		// It may be that the process still wrote to them.
		e.persistent.Drop()
		r.untell(got)
		return nil, fmt.Errorf("%w: its outputs could not be taken in: %w", persistent.ErrPlain, err)
	}
	return resp, err
}

// untell takes back what was told of a tool: the action runs plainly, in what is left
// of its time.
func (r *run) untell(got *persistent.Result) {
	r.timeout = max(r.timeout-got.Spent, time.Millisecond)
	m := r.metadata
	m.AuxiliaryMetadata = slices.DeleteFunc(m.AuxiliaryMetadata, func(a *anypb.Any) bool { return a.MessageIs((*persistentpb.Use)(nil)) })
	r.where = ""
}

// tell tells, in the result and in messages, that a tool was kept running.
func (r *run) tell(got *persistent.Result) error {
	use, err := anypb.New(&persistentpb.Use{RequestsBefore: got.Before, Failures: int32(got.Failures)}) //nolint:gosec // a few
	if err != nil {
		return err
	}
	r.metadata.AuxiliaryMetadata = append(r.metadata.AuxiliaryMetadata, use)
	r.where = ", in a persistent worker that was started for it"
	if got.Before > 0 {
		r.where = fmt.Sprintf(", in a persistent worker that had answered %d requests before", got.Before)
	}
	return nil
}
