package conform

import (
	"context"
	"fmt"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// task is an action that a case has executed.
type task struct {
	script  string // of /bin/sh
	command *repb.Command
	root    *repb.Directory
	action  *repb.Action
	request *repb.ExecuteRequest
}

// shell is a task that runs a script. What the case changes about it is kept.
func shell(script string, outputs ...string) *task {
	return &task{script: script, command: &repb.Command{OutputPaths: outputs}, root: &repb.Directory{}, action: &repb.Action{}, request: &repb.ExecuteRequest{}}
}

// store stores what of the task is to be in the CAS, and completes the request.
func (t *T) store(ctx context.Context, k *task) *repb.ExecuteRequest {
	if k.script != "" {
		k.command.Arguments = []string{"/bin/sh", "-c", k.script}
	}
	platform := &repb.Platform{Properties: t.o.Platform}
	if k.command.Platform == nil {
		k.command.Platform = platform
	}
	if k.action.Platform == nil {
		k.action.Platform = platform
	}
	if k.action.CommandDigest == nil {
		k.action.CommandDigest = t.putMessage(ctx, k.command)
	}
	if k.action.InputRootDigest == nil {
		k.action.InputRootDigest = t.putMessage(ctx, k.root)
	}
	if len(k.action.Salt) == 0 {
		k.action.Salt = t.bytes(16) // nobody has executed it
	}
	k.request.InstanceName, k.request.DigestFunction = t.o.Instance, t.function()
	k.request.ActionDigest = t.putMessage(ctx, k.action)
	return k.request
}

// execution is what a client sees of one.
type execution struct {
	operations []*longrunningpb.Operation
	response   *repb.ExecuteResponse // nil where there was none
	err        error                 // of the call
}

// follow reads a stream of operations to its end.
func follow(recv func() (*longrunningpb.Operation, error)) *execution {
	e := &execution{}
	for op, err := range messages(recv) {
		if err != nil {
			e.err = err
			return e
		}
		e.operations = append(e.operations, op)
		if op.GetDone() && op.GetResponse() != nil {
			e.response = &repb.ExecuteResponse{}
			if err := op.GetResponse().UnmarshalTo(e.response); err != nil {
				e.err = fmt.Errorf("the response: %w", err)
			}
		}
	}
	return e
}

// execute executes a task.
func (t *T) execute(ctx context.Context, k *task) *execution {
	s, err := t.calls.exec.Execute(ctx, t.store(ctx, k))
	if err != nil {
		return &execution{err: err}
	}
	return follow(s.Recv)
}

// run executes a task, and wants it to have run.
func (t *T) run(ctx context.Context, k *task) *repb.ExecuteResponse {
	e := t.execute(ctx, k)
	t.ok("Execute", e.err)
	if e.response == nil {
		t.fatalf("the stream has ended with no response, after %d operations", len(e.operations))
	}
	if s := e.response.GetStatus(); s.GetCode() != 0 {
		t.fatalf("the action did not run: %v", s)
	}
	return e.response
}

// refused is the status by which a task was refused, as that of the call or of the
// response.
func (e *execution) refused() error {
	if e.err != nil || e.response == nil {
		return e.err
	}
	return status.ErrorProto(e.response.GetStatus())
}

// output is the content of an output file.
func (t *T) output(ctx context.Context, r *repb.ActionResult, path string) []byte {
	for _, f := range r.GetOutputFiles() {
		if f.Path == path {
			data, err := t.read(ctx, t.readName(f.Digest), 0, 0)
			t.ok("Read of output "+path, err)
			return data
		}
	}
	t.fatalf("there is no output file %s in %v", path, r)
	return nil
}

// printed is stdout or stderr, however it comes.
func (t *T) printed(ctx context.Context, raw []byte, d *repb.Digest) string {
	if len(raw) > 0 || d == nil {
		return string(raw)
	}
	data, err := t.read(ctx, t.readName(d), 0, 0)
	t.ok("Read of what was printed", err)
	return string(data)
}

func (t *T) stdout(ctx context.Context, r *repb.ActionResult) string {
	return t.printed(ctx, r.GetStdoutRaw(), r.GetStdoutDigest())
}

func executeCases() []Case {
	return append(runCases(), cacheCases()...)
}

//nolint:revive // a table
func runCases() []Case {
	exec := []need{needsExecution}
	const (
		environment = "The environment variables to set when running the program."
		operations  = "Returns a stream of [google.longrunning.Operation][google.longrunning.Operation] messages describing the resulting execution"
		exits       = "The exit code of the command."
	)
	return []Case{
		{Name: "execute/exit_0", Clause: exits, Needs: exec, run: func(ctx context.Context, t *T) {
			if r := t.run(ctx, shell("true")); r.Result.GetExitCode() != 0 {
				t.errorf("exit_code is %d", r.Result.GetExitCode())
			}
		}},
		{Name: "execute/exit_7", Clause: exits, Needs: exec, run: func(ctx context.Context, t *T) {
			if r := t.run(ctx, shell("exit 7")); r.Result.GetExitCode() != 7 {
				t.errorf("exit_code is %d", r.Result.GetExitCode())
			}
		}},
		{Name: "execute/stdout", Clause: "The digest for a blob containing the standard output of the action", Needs: exec, run: func(ctx context.Context, t *T) {
			if got := t.stdout(ctx, t.run(ctx, shell("echo out; echo err >&2")).Result); got != "out\n" {
				t.errorf("stdout is %q", got)
			}
		}},
		{Name: "execute/stderr", Clause: "The digest for a blob containing the standard error of the action", Needs: exec, run: func(ctx context.Context, t *T) {
			r := t.run(ctx, shell("echo out; echo err >&2")).Result
			if got := t.printed(ctx, r.GetStderrRaw(), r.GetStderrDigest()); got != "err\n" {
				t.errorf("stderr is %q", got)
			}
		}},
		{Name: "execute/large_stdout", Clause: "MUST do so if inlining would cause the response to exceed message size limits.", Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("head -c 6000000 /dev/zero")
			k.request.InlineStdout = true
			if got := t.stdout(ctx, t.run(ctx, k).Result); len(got) != 6_000_000 {
				t.errorf("stdout has %d bytes of 6000000", len(got))
			}
		}},
		{Name: "execute/environment", Clause: environment, Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell(`printf '%s|%s' "$CONFORM_A" "$CONFORM_B"`)
			k.command.EnvironmentVariables = []*repb.Command_EnvironmentVariable{{Name: "CONFORM_A", Value: "a b"}, {Name: "CONFORM_B", Value: "=$x"}}
			if got := t.stdout(ctx, t.run(ctx, k).Result); got != "a b|=$x" {
				t.errorf("the variables are %q", got)
			}
		}},
		{Name: "execute/inputs", Clause: "The files in the directory tree are available in the correct location on the build machine before the command is executed.", Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("cat f dir/g; readlink link; test -x tool; test -d empty")
			dir := t.putMessage(ctx, &repb.Directory{Files: []*repb.FileNode{{Name: "g", Digest: t.put(ctx, []byte("of g\n"))}}})
			k.root = &repb.Directory{
				Files:       []*repb.FileNode{{Name: "f", Digest: t.put(ctx, []byte("of f\n"))}, {Name: "tool", Digest: t.put(ctx, []byte("#!/bin/sh\n")), IsExecutable: true}},
				Directories: []*repb.DirectoryNode{{Name: "dir", Digest: dir}, {Name: "empty", Digest: t.putMessage(ctx, &repb.Directory{})}},
				Symlinks:    []*repb.SymlinkNode{{Name: "link", Target: "dir/g"}},
			}
			r := t.run(ctx, k).Result
			if got := t.stdout(ctx, r); got != "of f\nof g\ndir/g\n" || r.GetExitCode() != 0 {
				t.errorf("the command saw %q and ended with %d", got, r.GetExitCode())
			}
		}},
		{Name: "execute/working_directory", Clause: "The working directory, relative to the input root, for the command to run in.", Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("cat g; echo made > out", "out")
			k.command.WorkingDirectory = "dir"
			dir := t.putMessage(ctx, &repb.Directory{Files: []*repb.FileNode{{Name: "g", Digest: t.put(ctx, []byte("of g\n"))}}})
			k.root = &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "dir", Digest: dir}}}
			r := t.run(ctx, k).Result
			if got := t.stdout(ctx, r); got != "of g\n" {
				t.errorf("the command saw %q", got)
			}
			t.same("the output, whose path is relative to the working directory", t.output(ctx, r, "out"), []byte("made\n"))
		}},
		{Name: "execute/path_lookup", Clause: "If the `environment_variables` list contains an entry for the PATH environment variable, it SHOULD be respected.", Level: Should, Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("")
			k.command.Arguments = []string{"sh", "-c", "echo found"}
			k.command.EnvironmentVariables = []*repb.Command_EnvironmentVariable{{Name: "PATH", Value: "/bin:/usr/bin"}}
			if got := t.stdout(ctx, t.run(ctx, k).Result); got != "found\n" {
				t.errorf("stdout is %q", got)
			}
		}},
		{Name: "execute/relative_program", Clause: "a path relative to the working directory", Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("")
			k.command.Arguments = []string{"./tool", "x"}
			k.root = &repb.Directory{Files: []*repb.FileNode{{Name: "tool", Digest: t.put(ctx, []byte("#!/bin/sh\necho tool $1\n")), IsExecutable: true}}}
			if got := t.stdout(ctx, t.run(ctx, k).Result); got != "tool x\n" {
				t.errorf("stdout is %q", got)
			}
		}},
		{Name: "execute/operations", Clause: operations, Needs: exec, run: func(ctx context.Context, t *T) {
			e := t.execute(ctx, shell("true"))
			t.ok("Execute", e.err)
			if len(e.operations) == 0 {
				t.fatalf("there is no operation")
			}
			for i, op := range e.operations {
				if op.GetName() == "" || op.GetName() != e.operations[0].GetName() {
					t.errorf("operation %d is called %q, the first %q", i, op.GetName(), e.operations[0].GetName())
				}
				if op.GetError() != nil {
					t.errorf("operation %d has the field error", i)
				}
				if op.GetDone() != (i == len(e.operations)-1) {
					t.errorf("operation %d of %d has done %v", i, len(e.operations), op.GetDone())
				}
			}
		}},
		{Name: "execute/stages", Clause: "If and only if the remote execution system reports that an operation has reached the COMPLETED stage, it MUST set the [done field][google.longrunning.Operation.done] of the [Operation][google.longrunning.Operation] and terminate the stream.", Needs: exec, run: func(ctx context.Context, t *T) {
			for i, op := range t.execute(ctx, shell("true")).operations {
				md := &repb.ExecuteOperationMetadata{}
				if err := op.GetMetadata().UnmarshalTo(md); err != nil {
					t.errorf("metadata of operation %d: %v", i, err)
					continue
				}
				if done := md.Stage == repb.ExecutionStage_COMPLETED; done != op.GetDone() {
					t.errorf("operation %d is in stage %v and has done %v", i, md.Stage, op.GetDone())
				}
				if md.Stage == repb.ExecutionStage_UNKNOWN {
					t.errorf("operation %d is in stage UNKNOWN", i)
				}
			}
		}},
		{Name: "execute/metadata_names_the_action", Clause: "The digest of the [Action][build.bazel.remote.execution.v2.Action] being executed.", Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("true")
			for i, op := range t.execute(ctx, k).operations {
				md := &repb.ExecuteOperationMetadata{}
				if err := op.GetMetadata().UnmarshalTo(md); err != nil || md.GetActionDigest().GetHash() != k.request.ActionDigest.Hash {
					t.errorf("operation %d is about %v, %v; want %v", i, md.GetActionDigest(), err, k.request.ActionDigest)
				}
			}
		}},
		{Name: "execute/first_operation_at_once", Clause: operations, Level: Should, Needs: exec, run: func(ctx context.Context, t *T) {
			s, err := t.calls.exec.Execute(ctx, t.store(ctx, shell("sleep 2; echo end")))
			t.ok("Execute", err)
			op, err := s.Recv()
			t.ok("Execute", err)
			if op.GetDone() {
				t.errorf("the first operation of an action that takes two seconds is its end: nobody could wait for it elsewhere")
			}
		}},
		{Name: "execute/worker_and_times", Clause: "ExecutedActionMetadata contains details about a completed execution.", Level: Should, Needs: exec, run: func(ctx context.Context, t *T) {
			m := t.run(ctx, shell("sleep 0.2")).Result.GetExecutionMetadata()
			if m.GetWorker() == "" {
				t.errorf("worker is empty")
			}
			last := time.Time{}
			for _, at := range []struct {
				name string
				time interface {
					IsValid() bool
					AsTime() time.Time
				}
			}{
				{"queued", m.GetQueuedTimestamp()},
				{"worker_start", m.GetWorkerStartTimestamp()},
				{"input_fetch_start", m.GetInputFetchStartTimestamp()},
				{"input_fetch_completed", m.GetInputFetchCompletedTimestamp()},
				{"execution_start", m.GetExecutionStartTimestamp()},
				{"execution_completed", m.GetExecutionCompletedTimestamp()},
				{"output_upload_start", m.GetOutputUploadStartTimestamp()},
				{"output_upload_completed", m.GetOutputUploadCompletedTimestamp()},
				{"worker_completed", m.GetWorkerCompletedTimestamp()},
			} {
				if !at.time.IsValid() || at.time.AsTime().Unix() == 0 {
					t.errorf("%s_timestamp is not set", at.name)
				} else if at.time.AsTime().Before(last) {
					t.errorf("%s_timestamp is before that of the step before it", at.name)
				} else {
					last = at.time.AsTime()
				}
			}
		}},
		{Name: "execute/virtual_duration", Clause: "the amount of time the worker spent executing the action command", Level: Should, Needs: append(exec, needsVersion(3)), run: func(ctx context.Context, t *T) {
			d := t.run(ctx, shell("sleep 0.5")).Result.GetExecutionMetadata().GetVirtualExecutionDuration()
			if d == nil || d.AsDuration() < 400*time.Millisecond {
				t.errorf("virtual_execution_duration of half a second's sleep is %v", d.AsDuration())
			}
		}},
		{Name: "execute/timeout", Clause: "A timeout after which the execution should be killed.", Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("echo printed before; sleep 40")
			k.action.Timeout = durationpb.New(time.Second)
			e := t.execute(ctx, k)
			t.want("an action that sleeps for 40 s with a timeout of 1 s", e.refused(), codes.DeadlineExceeded)
			if e.response == nil {
				t.errorf("the timeout is the status of the call; it is one of the execution")
			} else if e.response.GetResult() != nil { // optional
				if got := t.stdout(ctx, e.response.Result); got != "printed before\n" {
					t.errorf("what was printed before the timeout is %q", got)
				}
			}
		}},
		{Name: "execute/without_timeout", Clause: "If the timeout is absent, then the client is specifying that the execution should continue as long as the server will let it.", Needs: exec, run: func(ctx context.Context, t *T) {
			if got := t.stdout(ctx, t.run(ctx, shell("sleep 1; echo end")).Result); got != "end\n" {
				t.errorf("stdout is %q", got)
			}
		}},
		{Name: "execute/timeout_too_long", Clause: "if the client does specify a timeout that is longer than the server's maximum timeout, the server MUST reject the request.", Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("true")
			k.action.Timeout = durationpb.New(100 * 365 * 24 * time.Hour)
			e := t.execute(ctx, k)
			if e.err == nil && e.response != nil && e.response.GetStatus().GetCode() == 0 {
				t.errorf("a timeout of a hundred years is taken")
			}
		}},
		{Name: "execute/no_process_is_left", Clause: "A timeout after which the execution should be killed.", Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("(sleep 30; echo late) & echo soon")
			start := time.Now()
			if got := t.stdout(ctx, t.run(ctx, k).Result); got != "soon\n" || time.Since(start) > 25*time.Second {
				t.errorf("an action that leaves a process which holds its stdout ends after %v with %q", time.Since(start), got)
			}
		}},
		{Name: "execute/many_at_once", Clause: operations, Needs: exec, run: func(ctx context.Context, t *T) {
			const n = 32
			requests := make([]*repb.ExecuteRequest, n)
			for i := range requests {
				requests[i] = t.store(ctx, shell(fmt.Sprintf("echo %d", i)))
			}
			results := make(chan *execution, n)
			for _, r := range requests {
				go func() {
					s, err := t.calls.exec.Execute(ctx, r)
					if err != nil {
						results <- &execution{err: err}
						return
					}
					results <- follow(s.Recv)
				}()
			}
			for range n {
				e := <-results
				t.ok("one of 32 executions", e.err)
				if e.response.GetStatus().GetCode() != 0 || e.response.GetResult().GetExitCode() != 0 {
					t.errorf("one of 32 executions: %v", e.response)
				}
			}
		}},
		{Name: "execute/priorities", Clause: "Priorities may be positive or negative", Needs: exec, run: func(ctx context.Context, t *T) {
			for _, r := range t.caps.GetExecutionCapabilities().GetExecutionPriorityCapabilities().GetPriorities() {
				for _, p := range []int32{r.MinPriority, r.MaxPriority} {
					k := shell("true")
					k.request.ExecutionPolicy = &repb.ExecutionPolicy{Priority: p}
					e := t.execute(ctx, k)
					t.want(fmt.Sprintf("Execute with the announced priority %d", p), e.refused(), codes.OK)
				}
			}
		}},
	}
}
