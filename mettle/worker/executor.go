//go:build linux

package worker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/metrics/spans"
	"github.com/mettle-build/mettle/mettle/command"
	"github.com/mettle-build/mettle/mettle/worker/image"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
	"github.com/mettle-build/mettle/mettle/worker/livelog"
	"github.com/mettle-build/mettle/mettle/worker/output"
	"github.com/mettle-build/mettle/mettle/worker/persistent"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
	queuepb "github.com/mettle-build/mettle/proto/queue"
	workerpb "github.com/mettle-build/mettle/proto/worker"
)

// Executor is one slot: it runs one job at a time, in one directory. It knows
// no queue and no ActionCache.
type Executor struct {
	o        *Options
	dir      string // of the slot
	owner    inputroot.Owner
	made     fs.FileInfo // dir as it was made
	shelf    *inputroot.Shelf
	runners  *runners
	stations *stations
	logs     *livelog.Logs // nil: what commands print can't be followed
	// persistent has the tools that are kept running. nil: none are.
	persistent *persistent.Pool
	toolUser   helper.User
	answered   bool // it may have left something
	// asked is the container image that was asked for last, and askedRef what it is.
	asked    string
	askedRef image.Reference
	// imageAway says that the last job failed because a registry was away.
	imageAway bool
}

// What is in a slot's directory.
const (
	rootName   = "root"
	stdoutName = "stdout"
	stderrName = "stderr"
	shelfName  = "shelf"
	// What persistent workers are, and what one answered.
	persistentName = "persistent"
	answerName     = "answer"
)

func (e *Executor) root() string   { return filepath.Join(e.dir, rootName) }
func (e *Executor) stdout() string { return filepath.Join(e.dir, stdoutName) }
func (e *Executor) stderr() string { return filepath.Join(e.dir, stderrName) }

func (e *Executor) close() error {
	return errors.Join(e.closePersistent(), e.runners.close(), e.shelf.Close())
}

// maxActionBytes bounds an Action and a Command: a Command's arguments can't be
// longer than the kernel takes, some MiB, and its outputs are bounded.
const maxActionBytes = 16 << 20

// run is one job on its way.
type run struct {
	job     *queuepb.Job
	attempt uint32
	at      *station
	digest  digest.Digest
	action  *repb.Action
	command *repb.Command
	inputs  digest.Digest
	timeout time.Duration
	place   place
	tool    *persistent.Tool // nil: a plain command
	where   string           // more than the worker's name, for messages
	image   image.Reference  // of the place, as the action names it
	opened  *image.Image     // nil: it needed not be, or is taken
	clock   clock
	// announce is told where the command's output can be followed. nil: nowhere.
	announce func(context.Context, livelog.Names)
	metadata *repb.ExecutedActionMetadata
	notes    []string // for a person
	// entries are those of its input root, made those of them that were not there.
	entries, made int
}

// key is that of the run's result.
func (r *run) key() blob.EntryKey {
	return blob.EntryKey{Instance: r.job.GetInstanceName(), Action: r.digest}
}

// waited is how long the job was in the queue, as far as the clocks agree.
func (r *run) waited() time.Duration {
	if r.job.GetQueued() == nil {
		return 0
	}
	return time.Since(r.job.GetQueued().AsTime())
}

// load finds out what job asks for. The run is never nil, and has its metadata.
func (e *Executor) load(ctx context.Context, job *queuepb.Job, attempt uint32) (*run, error) {
	r := &run{job: job, attempt: attempt, metadata: &repb.ExecutedActionMetadata{Worker: e.o.Name}}
	r.start()
	var err error
	if r.digest, err = digest.Parse(job.GetActionDigest()); err != nil {
		return r, fmt.Errorf("action digest: %w", err)
	}
	if r.at, err = e.stations.of(job.GetInstanceName()); err != nil {
		return r, err
	}
	r.action = &repb.Action{}
	if err := r.message(ctx, job.GetAction(), r.digest, r.action); err != nil {
		return r, fmt.Errorf("action: %w", err)
	}
	fn := r.digest.Function()
	cmdDigest, err := digest.FromProto(fn, r.action.CommandDigest)
	if err != nil {
		return r, fmt.Errorf("command_digest: %w", err)
	}
	if r.inputs, err = digest.FromProto(fn, r.action.InputRootDigest); err != nil {
		return r, fmt.Errorf("input_root_digest: %w", err)
	}
	r.command = &repb.Command{}
	if err := r.message(ctx, job.GetCommand(), cmdDigest, r.command); err != nil {
		return r, fmt.Errorf("command: %w", err)
	}
	r.timeout = e.timeout(job.GetTimeout(), r.action.Timeout)
	if err := command.Validate(r.command); err != nil {
		return r, err
	}
	if r.place, err = e.o.placeOf(r.action, r.command); err != nil {
		return r, err
	}
	if r.image, err = e.imageOf(platformOf(r.action, r.command)); err != nil {
		return r, err
	}
	return r, e.findTool(r)
}

// message reads m from the job, or where that does not carry it from the store.
func (r *run) message(ctx context.Context, data []byte, d digest.Digest, m proto.Message) error {
	if len(data) == 0 && !d.IsEmpty() {
		err := blob.ReadMessage(ctx, r.at.store, d, maxActionBytes, m)
		if errors.Is(err, blob.ErrNotFound) {
			return &blob.MissingError{Digests: []digest.Digest{d}}
		}
		return err
	}
	if err := proto.Unmarshal(data, m); err != nil {
		return fmt.Errorf("%s is not a %s message: %w: %w", d, m.ProtoReflect().Descriptor().Name(), blob.ErrMalformed, err)
	}
	return nil
}

// timeout is the first of ds that is there and not 0, else the default: 0 would
// be the end of every action.
func (e *Executor) timeout(ds ...*durationpb.Duration) time.Duration {
	t := e.o.DefaultTimeout
	for _, d := range ds {
		if v := d.AsDuration(); v > 0 {
			t = v
			break
		}
	}
	if e.o.MaxTimeout > 0 {
		t = min(t, e.o.MaxTimeout)
	}
	return t
}

// errTimeout is the cause of a command's end by its timeout.
var errTimeout = errors.New("timeout")

// execute builds, runs and collects. The error is the context's cause where ctx
// was done, and there is no response then; everything else that goes wrong is in
// the response. The slot's directory is left as it is: see clean.
func (e *Executor) execute(ctx context.Context, r *run) (*repb.ExecuteResponse, error) {
	resp, err := e.attempt(ctx, r)
	if cause := context.Cause(ctx); cause != nil && err != nil {
		return nil, cause
	}
	if resp == nil {
		resp = &repb.ExecuteResponse{}
	}
	r.finish(resp, err)
	e.explain(r, resp)
	return resp, nil
}

// attempt's error is the status of the response, which may have a result all
// the same.
func (e *Executor) attempt(ctx context.Context, r *run) (*repb.ExecuteResponse, error) {
	if r.tool != nil {
		resp, err := e.attemptPersistent(ctx, r)
		if !errors.Is(err, persistent.ErrPlain) {
			return resp, err
		}
		r.notes = append(r.notes, err.Error())
	}
	m := r.metadata
	m.InputFetchStartTimestamp = r.clock.stamp()
	defer e.leaveImage(r)
	if err := e.openImage(ctx, r); err != nil {
		return nil, err
	}
	fetching, span := spans.Start(ctx, spanFetch)
	root, err := r.at.builder.Build(fetching, inputroot.Request{
		Dir: e.root(), Digest: r.inputs, Owner: e.owner, Shelf: e.shelf, Directories: directories(r.command),
	})
	spans.End(span, err)
	if err != nil {
		return nil, err
	}
	m.InputFetchCompletedTimestamp = r.clock.stamp()
	r.entries, r.made = root.Entries, root.Made
	live := e.follow(ctx, r)
	defer live.Wait()
	res, runErr := e.runCommand(ctx, r)
	live.End(e.ended(ctx, &res))
	if runErr != nil && !endedByLimit(runErr) {
		return nil, runErr
	}
	if err := root.Audit(ctx); errors.Is(err, blob.ErrCorrupt) {
		runErr = fmt.Errorf("%w: %w", errTampered, err)
	} else if err != nil {
		return nil, err
	}
	if err := e.truncate(&res); err != nil {
		return nil, err
	}
	return e.collect(ctx, r, ran{collector: r.at.collector, root: e.root(), stderr: e.stderr(), result: res, err: runErr})
}

// ran is what a command has left.
type ran struct {
	collector    *output.Collector
	root, stderr string
	result       runner.Result
	err          error // by which limit it was ended
}

// collect takes the outputs in.
func (e *Executor) collect(ctx context.Context, r *run, c ran) (*repb.ExecuteResponse, error) {
	m, res, runErr := r.metadata, &c.result, c.err
	m.OutputUploadStartTimestamp = r.clock.stamp()
	ctx, span := spans.Start(ctx, spanCollect)
	got, err := c.collector.Collect(ctx, output.Request{
		Root: c.root, Command: r.command, Owner: output.Owner(e.owner), Function: r.digest.Function(),
		Stdout: e.stdout(), Stderr: c.stderr, StdoutBytes: res.StdoutBytes, StderrBytes: res.StderrBytes,
	})
	if errors.Is(err, blob.ErrTooLarge) {
		err = fmt.Errorf("%w: %w", errNoRoom, err)
	}
	spans.End(span, err)
	if got == nil {
		return nil, err
	}
	m.OutputUploadCompletedTimestamp = r.clock.stamp()
	r.notes = append(append(r.notes, res.Notes...), got.Notes...)
	got.Result.ExitCode = int32(res.ExitCode) //nolint:gosec // it is below 256
	if endedBy(runErr) != workerpb.ResourceUsage_BY_ITSELF {
		// It is what the command came to on any worker like this: a result, not a
		// call that is worth another attempt.
		r.notes = append(r.notes, runErr.Error())
		runErr, got.Result.ExitCode = nil, exitKilled
	}
	resp := &repb.ExecuteResponse{Result: got.Result}
	if err != nil && (runErr != nil || got.Result.ExitCode != 0) {
		// The command has failed, and why is of more use than what is wrong
		// with its outputs.
		r.notes = append(r.notes, err.Error())
		err = nil
	}
	if runErr != nil {
		err = runErr
	}
	return resp, err
}

// follow begins to follow what the command prints, if somebody can be told of it.
func (e *Executor) follow(ctx context.Context, r *run) *livelog.Follower {
	if r.announce == nil {
		return nil
	}
	return e.logs.Follow(ctx, livelog.Command{
		Instance: r.job.GetInstanceName(), Stdout: e.stdout(), Stderr: e.stderr(), Announce: r.announce,
	})
}

// ended is the command's end, for who follows it.
func (e *Executor) ended(ctx context.Context, res *runner.Result) livelog.End {
	cause := context.Cause(ctx)
	return livelog.End{
		StdoutBytes: min(res.StdoutBytes, e.o.MaxOutputBytes), StderrBytes: min(res.StderrBytes, e.o.MaxOutputBytes),
		Elsewhere: errors.Is(cause, errLeaseLost) || errors.Is(cause, errAborted),
	}
}

// endedByLimit reports whether the command ran, and was ended by one of its limits.
func endedByLimit(err error) bool {
	for _, limit := range []error{errTimeout, runner.ErrOutputTooLarge, runner.ErrOutOfMemory, runner.ErrDiskQuota} {
		if errors.Is(err, limit) {
			return true
		}
	}
	return false
}

// runCommand runs the command and notes when it did.
func (e *Executor) runCommand(ctx context.Context, r *run) (runner.Result, error) {
	place, err := e.runners.of(r.place, r.takeImage())
	if err != nil {
		return runner.Result{}, err
	}
	ctx, span := spans.Start(ctx, spanRun)
	ctx, cancel := context.WithTimeoutCause(ctx, r.timeout, errTimeout)
	defer cancel()
	env := make([]string, len(r.command.EnvironmentVariables))
	for i, v := range r.command.EnvironmentVariables {
		env[i] = v.Name + "=" + v.Value
	}
	res, err := place.Run(ctx, runner.Spec{
		Args:           r.command.Arguments,
		Env:            env,
		Root:           e.root(),
		Dir:            filepath.Join(e.root(), command.WorkingDirectory(r.command)),
		Stdout:         e.stdout(),
		Stderr:         e.stderr(),
		MaxOutputBytes: e.o.MaxOutputBytes,
	})
	spans.End(span, err)
	if !res.Start.IsZero() {
		addUsage(r.metadata, &res.Usage, &e.o.Limits, endedBy(err))
		m := r.metadata
		m.ExecutionStartTimestamp = r.clock.stampAt(res.Start)
		m.ExecutionCompletedTimestamp = r.clock.stampAt(res.End)
		m.VirtualExecutionDuration = durationpb.New(max(0, res.End.Sub(res.Start)))
	}
	switch {
	case errors.Is(err, errTimeout):
		err = fmt.Errorf("%w: the command ran for longer than %v and was killed", errTimeout, r.timeout)
	case err != nil && context.Cause(ctx) == nil && e.isNowhere(r):
		err = fmt.Errorf("%w: the working_directory %.200q is not there: it lies behind a symlink of the input root that leads nowhere",
			command.ErrInvalid, r.command.WorkingDirectory)
	}
	return res, err
}

// isNowhere reports whether the input root is there, and the working directory,
// which was made in it unless it lies behind a symlink, is not.
func (e *Executor) isNowhere(r *run) bool {
	root, err := os.Lstat(e.root())
	if err != nil || !root.IsDir() {
		return false
	}
	dir, err := os.Stat(filepath.Join(e.root(), command.WorkingDirectory(r.command)))
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) || err == nil && !dir.IsDir()
}

// truncate cuts off what is over the limit of stdout and stderr.
func (e *Executor) truncate(res *runner.Result) error {
	for _, s := range []struct {
		path string
		size *int64
	}{{e.stdout(), &res.StdoutBytes}, {e.stderr(), &res.StderrBytes}} {
		if *s.size > e.o.MaxOutputBytes {
			*s.size = e.o.MaxOutputBytes
			if err := os.Truncate(s.path, *s.size); err != nil {
				return err
			}
		}
	}
	return nil
}

// directories are those that must be there before the command starts: its
// working directory, and the parents of its outputs.
func directories(c *repb.Command) []string {
	paths, files, dirs := command.Outputs(c)
	var all []string
	if wd := command.WorkingDirectory(c); wd != "" {
		all = append(all, wd)
	}
	for _, l := range [][]string{paths, files, dirs} {
		for _, p := range l {
			parent := path.Dir(command.OutputPath(c, p))
			if parent != "." && (len(all) == 0 || all[len(all)-1] != parent) {
				all = append(all, parent)
			}
		}
	}
	return all
}

// clean removes what the last run left behind.
func (e *Executor) clean() error {
	err := errors.Join(e.cleanPersistent(), e.repair(), e.shelf.Remove(e.root()))
	for _, p := range []string{e.stdout(), e.stderr()} {
		// Empty ones serve again: see runner.Spec.
		if st, e := os.Lstat(p); e == nil && (st.Size() > 0 || !st.Mode().IsRegular()) {
			err = errors.Join(err, inputroot.Remove(p))
		}
	}
	return err
}
