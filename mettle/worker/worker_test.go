//go:build linux

package worker_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestMain(m *testing.M) {
	if bare.IsHelper() {
		os.Exit(bare.HelperMain())
	}
	_ = os.Setenv("GORACE", "atexit_sleep_ms=0") // or each helper takes a second to end
	goleak.VerifyTestMain(m)
}

// fixture is a worker with a store, a queue and somebody who asks.
type fixture struct {
	store   *file.Store
	actions *action.Cache
	queue   *mem.Queue
	worker  *worker.Worker
	opts    worker.Options
	dir     string // of the worker
	ended   chan error
	updates chan *queuepb.Update
	n       int
}

type change func(*worker.Options, *mem.Options)

// testUIDBase is apart from those of other tests that may run at the same time.
const testUIDBase = 64100

func newFixture(t testing.TB, changes ...change) *fixture {
	t.Helper()
	// Below the temporary directory itself, so that each slot's user can get there.
	base, err := os.MkdirTemp("", "worker-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(base); err != nil {
			t.Errorf("something is left: %v", err)
		}
	})
	if err := os.Chmod(base, 0o711); err != nil { //nolint:gosec // as said
		t.Fatal(err)
	}
	f := &fixture{dir: filepath.Join(base, "work"), ended: make(chan error, 1), updates: make(chan *queuepb.Update, 1000)}
	if f.store, err = file.New(file.Options{Dir: filepath.Join(base, "store")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.store.Close() })
	if f.actions, err = action.New(action.Options{Store: f.store, Entries: f.store}); err != nil {
		t.Fatal(err)
	}
	qo := mem.Options{LeaseTime: time.Minute}
	f.opts = worker.Options{
		Store: f.store, Actions: f.actions, Dir: f.dir, Name: "tester", Addr: "server:1", Slots: 2, UIDBase: testUIDBase, MinFreeDiskBytes: -1,
	}
	for _, c := range changes {
		c(&f.opts, &qo)
	}
	if f.queue, err = mem.New(qo); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.queue.Close() })
	if f.opts.Jobs == nil {
		f.opts.Jobs = f.queue
	}
	if f.opts.Updates == nil {
		f.opts.Updates = f.queue
	}
	return f
}

// start runs the worker until the test ends.
func (f *fixture) start(t testing.TB) *fixture {
	t.Helper()
	var err error
	if f.worker, err = worker.New(f.opts); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	receiving, stopReceiving := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { f.ended <- f.worker.Run(ctx) })
	wg.Go(func() {
		_ = f.queue.ReceiveUpdates(receiving, "api", func(u *queuepb.Update) {
			select {
			case f.updates <- u:
			default:
			}
		})
	})
	t.Cleanup(func() {
		cancel()
		f.worker.Abort()
		stopReceiving()
		wg.Wait()
		if err := f.worker.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return f
}

// put stores bytes and returns their digest.
func (f *fixture) put(t testing.TB, data string) *repb.Digest {
	t.Helper()
	d, err := blob.PutBytes(t.Context(), f.store, digest.SHA256, []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	return d.Proto()
}

func (f *fixture) putMessage(t testing.TB, m proto.Message) *repb.Digest {
	t.Helper()
	d, err := blob.PutMessage(t.Context(), f.store, digest.SHA256, m)
	if err != nil {
		t.Fatal(err)
	}
	return d.Proto()
}

// request is an action to be.
type request struct {
	script  string // for sh -c
	root    *repb.Directory
	command *repb.Command // its arguments and environment are filled in
	action  *repb.Action
	job     *queuepb.Job
}

// publish makes a job of the request.
func (f *fixture) publish(t testing.TB, r request) *queuepb.Job {
	t.Helper()
	job := f.makeJob(t, r)
	if err := f.queue.Publish(t.Context(), job); err != nil {
		t.Fatal(err)
	}
	return job
}

func (f *fixture) makeJob(t testing.TB, r request) *queuepb.Job {
	t.Helper()
	f.n++
	if r.command == nil {
		r.command = &repb.Command{}
	}
	if r.command.Arguments == nil {
		r.command.Arguments = []string{"/bin/sh", "-c", r.script}
		r.command.EnvironmentVariables = append(r.command.EnvironmentVariables, &repb.Command_EnvironmentVariable{Name: "PATH", Value: "/usr/bin:/bin"})
	}
	if r.action == nil {
		r.action = &repb.Action{}
	}
	if r.root == nil {
		r.root = &repb.Directory{}
	}
	if r.action.CommandDigest == nil {
		r.action.CommandDigest = f.putMessage(t, r.command)
	}
	if r.action.InputRootDigest == nil {
		r.action.InputRootDigest = f.putMessage(t, r.root)
	}
	r.action.Salt = append(r.action.Salt, byte(f.n), byte(f.n>>8))
	d := f.putMessage(t, r.action)
	if r.job == nil {
		r.job = &queuepb.Job{}
	}
	r.job.Operation = fmt.Sprint("operation ", f.n)
	r.job.ReplyTo = "api"
	r.job.Pool = queue.DefaultPool
	r.job.ActionDigest = fmt.Sprintf("%s/%d", d.Hash, d.SizeBytes)
	r.job.Queued = timestamppb.Now()
	return r.job
}

// wait returns the response of the job, and the stages that were reported.
func (f *fixture) wait(t testing.TB, job *queuepb.Job) *repb.ExecuteResponse {
	t.Helper()
	for {
		select {
		case u := <-f.updates:
			if u.Operation != job.Operation || u.Stage != queuepb.Update_COMPLETED {
				continue
			}
			resp := &repb.ExecuteResponse{}
			if err := proto.Unmarshal(u.ExecuteResponse, resp); err != nil {
				t.Fatal(err)
			}
			if len(u.ExecuteResponse) == 0 {
				t.Fatalf("the response of %s is empty: %v", job.Operation, u)
			}
			return resp
		case err := <-f.ended:
			f.ended <- err
			t.Fatalf("the worker ended: %v", err)
		case <-time.After(30 * time.Second):
			t.Fatal("no response within 30 s")
		}
	}
}

func (f *fixture) execute(t testing.TB, r request) *repb.ExecuteResponse {
	t.Helper()
	return f.wait(t, f.publish(t, r))
}

// run is execute for an action that is to end with the given exit code.
func (f *fixture) run(t testing.TB, r request, exitCode int32) *repb.ActionResult {
	t.Helper()
	resp := f.execute(t, r)
	if resp.Status.GetCode() != 0 || resp.Result.GetExitCode() != exitCode {
		t.Fatalf("status %v, exit code %d, want %d; stdout %q, stderr %q", resp.Status, resp.Result.GetExitCode(), exitCode, resp.Result.GetStdoutRaw(), resp.Result.GetStderrRaw())
	}
	return resp.Result
}

func (f *fixture) read(t testing.TB, d *repb.Digest) string {
	t.Helper()
	dd, err := digest.FromProto(digest.SHA256, d)
	if err != nil {
		t.Fatal(err)
	}
	data, err := blob.ReadAll(t.Context(), f.store, dd, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestWorker_trivial(t *testing.T) {
	f := newFixture(t).start(t)
	r := f.run(t, request{command: &repb.Command{Arguments: []string{"/bin/true"}}}, 0)
	if r.StdoutDigest != nil || r.StderrDigest != nil || len(r.OutputFiles) != 0 {
		t.Errorf("result %v, want nothing but metadata", r)
	}
	checkMetadata(t, r.ExecutionMetadata)
}

func checkMetadata(t *testing.T, m *repb.ExecutedActionMetadata) {
	t.Helper()
	if m.GetWorker() != "tester" {
		t.Errorf("worker %q, want tester", m.GetWorker())
	}
	last := time.Time{}
	for _, s := range []struct {
		name  string
		stamp *timestamppb.Timestamp
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
		if s.stamp == nil {
			t.Errorf("no %s timestamp", s.name)
			continue
		}
		if now := s.stamp.AsTime(); now.Before(last) {
			t.Errorf("%s is at %v, before the stage before it at %v", s.name, now, last)
		} else {
			last = now
		}
	}
	if d := m.GetVirtualExecutionDuration().AsDuration(); d <= 0 || d > time.Minute {
		t.Errorf("virtual_execution_duration %v", d)
	}
}

func TestWorker_clockOfTheServerIsAhead(t *testing.T) {
	f := newFixture(t).start(t)
	job := f.makeJob(t, request{script: "true"})
	job.Queued = timestamppb.New(time.Now().Add(time.Hour))
	if err := f.queue.Publish(t.Context(), job); err != nil {
		t.Fatal(err)
	}
	checkMetadata(t, f.wait(t, job).Result.ExecutionMetadata)
}

func TestWorker_outputs(t *testing.T) {
	f := newFixture(t).start(t)
	r := f.run(t, request{
		root: &repb.Directory{
			Files:       []*repb.FileNode{{Name: "in", Digest: f.put(t, "input")}},
			Directories: []*repb.DirectoryNode{{Name: "w", Digest: f.putMessage(t, &repb.Directory{})}},
		},
		command: &repb.Command{WorkingDirectory: "w", OutputPaths: []string{"d", "missing", "o/copy", "o/tool"}},
		script:  `cp ../in o/copy; printf '#!/bin/sh' > o/tool; chmod +x o/tool; mkdir -p d/e; echo leaf > d/e/leaf; echo out; echo err >&2; pwd >&2`,
	}, 0)
	if o := r.OutputFiles; len(o) != 2 || o[0].Path != "o/copy" || o[0].IsExecutable || o[1].Path != "o/tool" || !o[1].IsExecutable {
		t.Fatalf("output files %v", o)
	}
	if got := f.read(t, r.OutputFiles[0].Digest); got != "input" {
		t.Errorf("o/copy is %q", got)
	}
	if len(r.OutputDirectories) != 1 || r.OutputDirectories[0].Path != "d" || !r.OutputDirectories[0].IsTopologicallySorted {
		t.Errorf("output directories %v", r.OutputDirectories)
	}
	if string(r.StdoutRaw) != "out\n" || f.read(t, r.StdoutDigest) != "out\n" {
		t.Errorf("stdout %q", r.StdoutRaw)
	}
	if !strings.HasPrefix(string(r.StderrRaw), "err\n"+f.dir) || !strings.HasSuffix(string(r.StderrRaw), "/w\n") {
		t.Errorf("stderr %q", r.StderrRaw)
	}
}

func TestWorker_cachesOnlySuccess(t *testing.T) {
	f := newFixture(t).start(t)
	for name, tc := range map[string]struct {
		r      request
		cached bool
	}{
		"success":      {request{script: "echo x"}, true},
		"failure":      {request{script: "exit 3"}, false},
		"do_not_cache": {request{script: "true", action: &repb.Action{DoNotCache: true}}, false},
		"timeout":      {request{script: "sleep 100", job: &queuepb.Job{Timeout: durationpb.New(50 * time.Millisecond)}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			job := f.publish(t, tc.r)
			resp := f.wait(t, job)
			got, err := f.actions.Get(t.Context(), keyOf(t, job))
			if (err == nil) != tc.cached {
				t.Fatalf("in the cache: %v, want %v", err, tc.cached)
			}
			if tc.cached && (len(got.StdoutRaw) != 0 || got.StdoutDigest == nil || !proto.Equal(got.ExecutionMetadata, resp.Result.ExecutionMetadata)) {
				t.Errorf("cached result %v", got)
			}
		})
	}
}

func keyOf(t testing.TB, job *queuepb.Job) blob.EntryKey {
	t.Helper()
	d, err := digest.Parse(job.ActionDigest)
	if err != nil {
		t.Fatal(err)
	}
	return blob.EntryKey{Instance: job.InstanceName, Action: d}
}

func TestWorker_timeout(t *testing.T) {
	f := newFixture(t).start(t)
	resp := f.execute(t, request{
		script:  "echo partial; echo result > out; (setsid sleep 1000 &); sleep 1000",
		command: &repb.Command{OutputPaths: []string{"out"}},
		job:     &queuepb.Job{Timeout: durationpb.New(300 * time.Millisecond)},
	})
	if codes.Code(resp.Status.GetCode()) != codes.DeadlineExceeded || !strings.Contains(resp.Status.Message, "longer than 300ms") {
		t.Errorf("status %v, want DEADLINE_EXCEEDED", resp.Status)
	}
	if string(resp.Result.GetStdoutRaw()) != "partial\n" || len(resp.Result.GetOutputFiles()) != 1 || resp.Result.ExitCode == 0 {
		t.Errorf("result %v, want what there was", resp.Result)
	}
	if d := resp.Result.ExecutionMetadata.VirtualExecutionDuration.AsDuration(); d < 300*time.Millisecond || d > 20*time.Second {
		t.Errorf("virtual_execution_duration %v", d)
	}
	checkMetadata(t, resp.Result.ExecutionMetadata)
	f.wantNoProcesses(t)
}

// wantNoProcesses checks that nothing runs in the worker's directory.
func (f *fixture) wantNoProcesses(t *testing.T) {
	t.Helper()
	all, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, link := range all {
		if wd, err := os.Readlink(link); err == nil && strings.HasPrefix(wd, f.dir) {
			t.Errorf("%s is in %s", link, wd)
		}
	}
}

func TestWorker_absentTimeoutIsTheDefault(t *testing.T) {
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.DefaultTimeout = 10 * time.Second }).start(t)
	f.run(t, request{script: "sleep 0.1"}, 0)
	f.run(t, request{script: "sleep 0.1", action: &repb.Action{Timeout: durationpb.New(0)}}, 0)
	f.opts.DefaultTimeout = 0
	g := newFixture(t, func(o *worker.Options, _ *mem.Options) {
		o.DefaultTimeout, o.MaxTimeout = time.Hour, 100*time.Millisecond
	}).start(t)
	if resp := g.execute(t, request{script: "sleep 100"}); codes.Code(resp.Status.GetCode()) != codes.DeadlineExceeded {
		t.Errorf("status %v, want DEADLINE_EXCEEDED by MaxTimeout", resp.Status)
	}
}

func TestWorker_failureMessage(t *testing.T) {
	f := newFixture(t).start(t)
	job := f.makeJob(t, request{script: "exit 3", job: &queuepb.Job{InstanceName: "main"}})
	if err := f.queue.Publish(t.Context(), job); err != nil {
		t.Fatal(err)
	}
	resp := f.wait(t, job)
	if want := "Ran on worker tester. To run it again by hand: mettle one " + job.ActionDigest + " --remote=server:1 --instance=main"; resp.Message != want {
		t.Errorf("message %q, want %q", resp.Message, want)
	}
}

func TestWorker_refusals(t *testing.T) {
	f := newFixture(t).start(t)
	lost := func(s string) *repb.Digest { return digest.Of(digest.SHA256, []byte(s)).Proto() }
	subject := func(d *repb.Digest) string { return fmt.Sprintf("blobs/%s/%d", d.Hash, d.SizeBytes) }
	for name, tc := range map[string]struct {
		r       request
		code    codes.Code
		missing []string // subjects of violations
		message string
	}{
		"missing action": {request{job: &queuepb.Job{}}, codes.FailedPrecondition, nil, ""},
		"missing command": {
			request{action: &repb.Action{CommandDigest: lost("command")}},
			codes.FailedPrecondition,
			[]string{subject(lost("command"))},
			"",
		},
		"missing root": {
			request{script: "true", action: &repb.Action{InputRootDigest: lost("root")}},
			codes.FailedPrecondition,
			[]string{subject(lost("root"))},
			"",
		},
		"missing inputs": {
			request{script: "touch ran", root: &repb.Directory{
				Files: []*repb.FileNode{
					{Name: "a", Digest: lost("a")},
					{Name: "b", Digest: lost("b"), IsExecutable: true},
					{Name: "c", Digest: f.put(t, "c")},
					{Name: "d", Digest: lost("a")},
				},
				Directories: []*repb.DirectoryNode{{Name: "e", Digest: lost("e")}},
			}},
			codes.FailedPrecondition,
			[]string{subject(lost("e")), subject(lost("a")), subject(lost("b"))},
			"",
		},
		"escaping output": {
			request{script: "true", command: &repb.Command{OutputPaths: []string{"../../../x"}}},
			codes.InvalidArgument, nil, "leads out of the input root",
		},
		"no arguments": {request{command: &repb.Command{Arguments: []string{}}, action: &repb.Action{CommandDigest: f.putMessage(t, &repb.Command{})}}, codes.InvalidArgument, nil, "arguments is empty"},
		"escaping input": {
			request{script: "true", root: &repb.Directory{Files: []*repb.FileNode{{Name: "../x", Digest: f.put(t, "c")}}}},
			codes.InvalidArgument, nil, "../x",
		},
		"not a directory": {
			request{script: "true", action: &repb.Action{InputRootDigest: f.put(t, "\xff\xff not a message")}},
			codes.InvalidArgument, nil, "Directory",
		},
		"no input root": {
			request{script: "true", action: &repb.Action{InputRootDigest: &repb.Digest{Hash: "x"}}},
			codes.InvalidArgument, nil, "input_root_digest",
		},
	} {
		t.Run(name, func(t *testing.T) {
			job := f.makeJob(t, tc.r)
			if name == "missing action" {
				d := lost("action")
				job.ActionDigest = fmt.Sprintf("%s/%d", d.Hash, d.SizeBytes)
				tc.missing = []string{subject(d)}
			}
			if err := f.queue.Publish(t.Context(), job); err != nil {
				t.Fatal(err)
			}
			resp := f.wait(t, job)
			if got := codes.Code(resp.Status.GetCode()); got != tc.code || !strings.Contains(resp.Status.Message, tc.message) {
				t.Errorf("status %v, want %v about %q", resp.Status, tc.code, tc.message)
			}
			var subjects []string
			for _, d := range resp.Status.GetDetails() {
				failure := &errdetails.PreconditionFailure{}
				if err := d.UnmarshalTo(failure); err != nil {
					t.Fatal(err)
				}
				for _, v := range failure.Violations {
					if v.Type != "MISSING" {
						t.Errorf("violation %v", v)
					}
					subjects = append(subjects, v.Subject)
				}
			}
			if fmt.Sprint(subjects) != fmt.Sprint(tc.missing) {
				t.Errorf("missing %q, want %q", subjects, tc.missing)
			}
			if !strings.Contains(resp.Message, "worker tester") {
				t.Errorf("message %q does not name the worker", resp.Message)
			}
		})
	}
	f.run(t, request{script: "true"}, 0)
}

func TestWorker_outputTooLarge(t *testing.T) {
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.MaxOutputBytes = 1000 }).start(t)
	resp := f.execute(t, request{script: "yes"})
	if codes.Code(resp.Status.GetCode()) != codes.InvalidArgument || resp.Result.StdoutDigest.GetSizeBytes() != 1000 {
		t.Errorf("status %v, stdout of %d bytes", resp.Status, resp.Result.StdoutDigest.GetSizeBytes())
	}
}

func TestWorker_typeMismatch(t *testing.T) {
	f := newFixture(t).start(t)
	r := request{script: "mkdir out; echo log", command: &repb.Command{OutputFiles: []string{"out"}}}
	if resp := f.execute(t, r); codes.Code(resp.Status.GetCode()) != codes.FailedPrecondition || string(resp.Result.GetStdoutRaw()) != "log\n" {
		t.Errorf("status %v, stdout %q, want FAILED_PRECONDITION with the log", resp.Status, resp.Result.GetStdoutRaw())
	}
	r = request{script: "mkdir out; exit 9", command: &repb.Command{OutputFiles: []string{"out"}}}
	resp := f.execute(t, r)
	if resp.Status.GetCode() != 0 || resp.Result.ExitCode != 9 || !strings.Contains(resp.Message, "is a directory") {
		t.Errorf("status %v, exit code %d, message %q", resp.Status, resp.Result.ExitCode, resp.Message)
	}
}

// hostile actions try to change an input for all others.
var hostile = map[string]string{
	"write":          "echo evil > in",
	"append":         "echo evil >> tool",
	"chmod":          "chmod 777 in; echo evil > in",
	"chmod +x":       "chmod 777 in",
	"rename":         "echo evil > n; mv -f n in",
	"replace":        "rm -f in; echo evil > in",
	"truncate":       "chmod +w in; : > in",
	"write by child": "(setsid sh -c 'sleep 0.05; chmod +w in; echo evil > in' &) ; sleep 0.1",
}

func TestWorker_inputsCantBeChanged(t *testing.T) {
	f := newFixture(t).start(t)
	for name, script := range hostile {
		t.Run(name, func(t *testing.T) {
			// Of its own, since a changed blob is withdrawn.
			text := "good " + name
			req := request{script: script + "; true", action: &repb.Action{DoNotCache: true}, root: &repb.Directory{Files: []*repb.FileNode{
				{Name: "in", Digest: f.put(t, text)},
				{Name: "tool", Digest: f.put(t, text), IsExecutable: true},
			}}}
			resp := f.execute(t, req)
			req.script, req.command = "cat in; cat tool; stat -c %a in tool", nil
			req.action = &repb.Action{}
			f.put(t, text) // as a client does that hears of a missing blob
			r := f.run(t, req, 0)
			if got, want := string(r.StdoutRaw), text+text+"444\n555\n"; got != want {
				t.Errorf("the next action sees %q, want %q", got, want)
			}
			if got := f.read(t, f.put(t, text)); got != text {
				t.Errorf("the store has %q, want %q", got, text)
			}
			if resp.Status.GetCode() != 0 && (os.Getuid() == 0 || !strings.Contains(resp.Status.Message, "read-only")) {
				t.Errorf("the hostile action has status %v", resp.Status)
			}
		})
	}
}

func TestWorker_equalInputsAreApart(t *testing.T) {
	f := newFixture(t).start(t)
	d := f.put(t, "same")
	r := f.run(t, request{
		root: &repb.Directory{Files: []*repb.FileNode{
			{Name: "a", Digest: d},
			{Name: "b", Digest: d},
			{Name: "e1", Digest: digest.Empty(digest.SHA256).Proto()},
			{Name: "e2", Digest: digest.Empty(digest.SHA256).Proto()},
			{Name: "x", Digest: d, IsExecutable: true},
		}},
		script: `stat -c '%i' a b e1 e2 x | sort | uniq | wc -l; mv -f a b; ls a; echo; ls -1 | tr '\n' ' '; test -x x && test ! -x b`,
	}, 0)
	if got, want := string(r.StdoutRaw), "5\n\nb e1 e2 x "; got != want {
		t.Errorf("stdout %q, want %q", got, want)
	}
}

// An output has the mode that the action gave it, whatever the store's file of
// the same bytes has.
func TestWorker_executableTwins(t *testing.T) {
	f := newFixture(t).start(t)
	r := f.run(t, request{
		root:    &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: f.put(t, "twin"), IsExecutable: true}}},
		command: &repb.Command{OutputPaths: []string{"d", "d/run", "plain", "run"}},
		script:  `printf twin > plain; printf twin > run; chmod +x run; mkdir d; cp run d/run; echo other > d/tool; chmod +x d/tool`,
	}, 0)
	got := map[string]bool{}
	for _, o := range r.OutputFiles {
		got[o.Path] = o.IsExecutable
	}
	if len(got) != 3 || got["plain"] || !got["run"] || !got["d/run"] {
		t.Errorf("executable: %v", got)
	}
}

func TestWorker_outputsNeverLeadOutside(t *testing.T) {
	f := newFixture(t).start(t)
	secret := filepath.Join(filepath.Dir(f.dir), "secret")
	if err := os.WriteFile(secret, []byte("host"), 0o644); err != nil { //nolint:gosec // anyone may read it, and it must not be returned
		t.Fatal(err)
	}
	resp := f.execute(t, request{
		command: &repb.Command{OutputPaths: []string{"above/secret", "absolute", "behind/secret", "dangling", "device", "dir", "fifo", "loop/x", "proc/root/etc/passwd", "real"}},
		// The parents of outputs are there before the command is.
		script: `rm -r above behind loop proc; ln -s ` + filepath.Dir(secret) + ` behind; ln -s ` + secret + ` absolute; ln -s ../../.. above; ln -s nowhere dangling
			mkfifo fifo; ln -s /dev/zero device; mkdir -p dir/sub; mkfifo dir/fifo; ln -s ` + secret + ` dir/link; ln -s loop loop; ln -s /proc/self proc; echo real > real`,
	})
	if resp.Status.GetCode() != 0 || resp.Result.GetExitCode() != 0 {
		t.Fatalf("status %v, %s", resp.Status, resp.Result.GetStderrRaw())
	}
	if len(resp.Result.OutputFiles) != 1 || resp.Result.OutputFiles[0].Path != "real" {
		t.Errorf("output files %v, want only the real one", resp.Result.OutputFiles)
	}
	links := map[string]string{}
	for _, s := range resp.Result.OutputSymlinks {
		links[s.Path] = s.Target
	}
	if len(links) != 3 || links["absolute"] != secret || links["dangling"] != "nowhere" || links["device"] != "/dev/zero" {
		t.Errorf("symlinks %v", links)
	}
	for _, want := range []string{"above/secret", "behind/secret", "fifo", "dir/fifo", "loop/x", "proc/root/etc/passwd"} {
		if !strings.Contains(resp.Message, fmt.Sprintf("%q", want)) {
			t.Errorf("message %q does not explain %s", resp.Message, want)
		}
	}
	f.run(t, request{script: "true"}, 0)
}

// What an action can do to its own directory must not stay.
func TestWorker_leavesNoFiles(t *testing.T) {
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.Slots = 1 }).start(t)
	f.run(t, request{script: "mkdir -p a/b/c; touch a/b/c/d; chmod 000 a/b/c a/b a; chmod 500 .; echo out", root: &repb.Directory{
		Files: []*repb.FileNode{{Name: "in", Digest: f.put(t, "in")}},
	}}, 0)
	r := f.run(t, request{script: "ls -A; ls -A .. || true"}, 0)
	if got := string(r.StdoutRaw); os.Getuid() != 0 && got != "root\nshelf\nstderr\nstdout\n" || os.Getuid() == 0 && got != "" {
		t.Errorf("the next action sees %q", got)
	}
}

func TestWorker_slotsAreApart(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	f := newFixture(t).start(t)
	one := f.publish(t, request{script: "chmod 777 . ; echo mine > mine; touch up; until [ -e stop ]; do sleep 0.01; done; cat mine"})
	f.waitRunning(t)
	r := f.execute(t, request{script: fmt.Sprintf(`
		for s in %s/slot0 %s/slot1; do echo evil > $s/root/mine; ls $s; done 2>/dev/null | grep -v "^$"; id -u; kill -9 -1`, f.dir, f.dir)})
	if out := strings.Fields(string(r.Result.GetStdoutRaw())); len(out) != 1 || r.Result.ExitCode != 0 && r.Result.ExitCode != 137 {
		t.Errorf("stdout %q, exit code %d", out, r.Result.ExitCode)
	}
	for _, s := range []string{"slot0", "slot1"} {
		if _, err := os.Stat(filepath.Join(f.dir, s, "root", "mine")); err == nil {
			if err := os.WriteFile(filepath.Join(f.dir, s, "root", "stop"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if resp := f.wait(t, one); string(resp.Result.GetStdoutRaw()) != "mine\n" {
		t.Errorf("the other slot's action: %v", resp)
	}
}

func TestWorker_cancelled(t *testing.T) {
	f := newFixture(t).start(t)
	job := f.publish(t, request{script: "(setsid sleep 1000 &); touch $PWD/up; sleep 1000"})
	f.waitRunning(t)
	if err := f.queue.Cancel(t.Context(), job.Operation); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		waiting, leased := f.queue.Len()
		return waiting+leased == 0 && f.marker() == ""
	})
	f.wantNoProcesses(t)
	f.run(t, request{script: "true"}, 0)
}

// marker is the file up of an action that runs.
func (f *fixture) marker() string {
	m, _ := filepath.Glob(filepath.Join(f.dir, "slot*", "root", "up"))
	return strings.Join(m, " ")
}

func (f *fixture) waitRunning(t *testing.T) {
	t.Helper()
	waitFor(t, func() bool { return f.marker() != "" })
}

// waitFor waits for something that only another process can tell by its effect.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(start) > 20*time.Second {
			t.Fatal("waited for too long")
		}
	}
}

func TestWorker_drains(t *testing.T) {
	f := newFixture(t)
	w, err := worker.New(f.opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	job := f.publish(t, request{script: "touch up; until [ -e go ]; do sleep 0.01; done"})
	f.waitRunning(t)
	if err := w.Ready(); err != nil {
		t.Errorf("Ready: %v", err)
	}
	cancel()
	waiting := f.publish(t, request{script: "true"})
	select {
	case err := <-ended:
		t.Fatalf("Run ended with an action running: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := os.WriteFile(strings.TrimSuffix(f.marker(), "up")+"go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
	if _, err := f.actions.Get(t.Context(), keyOf(t, job)); err != nil {
		t.Errorf("the result of the running action: %v", err)
	}
	if n, leased := f.queue.Len(); n != 1 || leased != 0 {
		t.Errorf("%d jobs wait, %d are leased, want %s to wait", n, leased, waiting.Operation)
	}
	if w.Ready() == nil {
		t.Error("Ready after the end")
	}
	if err := w.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(f.dir, "slot*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestWorker_Abort(t *testing.T) {
	f := newFixture(t)
	w, err := worker.New(f.opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	f.publish(t, request{script: "touch up; sleep 1000"})
	f.waitRunning(t)
	cancel()
	w.Abort()
	w.Abort()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
	if waiting, leased := f.queue.Len(); waiting != 1 || leased != 0 {
		t.Errorf("%d jobs wait, %d are leased, want the job back in the queue", waiting, leased)
	}
	if err := w.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	f.wantNoProcesses(t)
}

func TestNew_oneDirectoryOneWorker(t *testing.T) {
	f := newFixture(t).start(t)
	if _, err := worker.New(f.opts); err == nil || !strings.Contains(err.Error(), "another worker uses it") {
		t.Errorf("New: %v, want it refused", err)
	}
}

// A worker that was killed leaves its directory as it was.
func TestNew_cleansUp(t *testing.T) {
	f := newFixture(t)
	old := filepath.Join(f.dir, "slot7", "root", "a")
	if err := os.MkdirAll(old, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(old, 0); err != nil {
		t.Fatal(err)
	}
	f.start(t)
	if _, err := os.Stat(filepath.Join(f.dir, "slot7")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("slot7 is still there: %v", err)
	}
}

func TestWorker_waitsForDisk(t *testing.T) {
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.MinFreeDiskBytes = 1 << 60 }).start(t)
	f.publish(t, request{script: "true"})
	waitFor(t, func() bool {
		err := f.worker.Ready()
		return err != nil && strings.Contains(err.Error(), "less than the limit")
	})
	if waiting, leased := f.queue.Len(); waiting != 1 || leased != 0 {
		t.Errorf("%d jobs wait, %d are leased, want it to wait", waiting, leased)
	}
}

func TestWorker_metrics(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.Registerer = registry }).start(t)
	f.run(t, request{script: "true"}, 0)
	f.run(t, request{script: "false"}, 1)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v %v", problems, err)
	}
	counts := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			counts[f.GetName()+labels(m)] = m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	for name, want := range map[string]float64{
		"mettle_worker_actions_total success":                1,
		"mettle_worker_actions_total nonzero_exit":           1,
		"mettle_worker_stage_duration_seconds execution":     2,
		"mettle_worker_stage_duration_seconds input_fetch":   2,
		"mettle_worker_stage_duration_seconds output_upload": 2,
	} {
		if counts[name] != want {
			t.Errorf("%s is %v, want %v", name, counts[name], want)
		}
	}
}

func labels(m *dto.Metric) (s string) {
	for _, l := range m.Label {
		s += " " + l.GetValue()
	}
	return s
}

func TestOne(t *testing.T) {
	f := newFixture(t)
	job := f.makeJob(t, request{script: "cat in; echo made > made; exit 4", root: &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: f.put(t, "input")}}}})
	resp, root, err := worker.One(t.Context(), worker.Options{Store: f.store, Dir: f.dir, UIDBase: testUIDBase}, job)
	if err != nil {
		t.Fatal(err)
	}
	if resp.Result.ExitCode != 4 || string(resp.Result.StdoutRaw) != "input" {
		t.Errorf("response %v", resp)
	}
	for name, want := range map[string]string{"in": "input", "made": "made\n", "../stdout": "input"} {
		if data, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(data) != want {
			t.Errorf("%s is %q, %v, want %q", name, data, err, want)
		}
	}
}
