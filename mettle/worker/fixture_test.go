//go:build linux

package worker_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestMain(m *testing.M) {
	if bare.IsHelper() {
		os.Exit(bare.HelperMain())
	}
	if sandbox.IsHelper() {
		os.Exit(sandbox.HelperMain())
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

// isolationVar names, in the environment, what keeps the actions of tests from the
// machine that say nothing of it. TestWorker_everythingIsolated sets it.
const isolationVar = "METTLE_TEST_ISOLATION"

// allIsolated reports whether the actions of tests that say nothing run in a
// sandbox.
func allIsolated() bool { return os.Getenv(isolationVar) == string(worker.Namespaces) }

// isBare is for tests that are about what a sandbox rules out, or take place where
// its actions can't look.
func isBare(o *worker.Options, _ *mem.Options) { o.Isolation = worker.Bare }

// testUIDBase is apart from those of other tests that may run at the same time.
const testUIDBase = 64100

func newFixture(t testing.TB, changes ...change) *fixture {
	t.Helper()
	// Below the temporary directory itself, so that each slot's user can get there.
	base, err := os.MkdirTemp("", "worker-test-") //nolint:usetesting // as said
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
		Isolation: worker.Isolation(os.Getenv(isolationVar)),
		// So that what is reported does not depend on how fast the machine is.
		AnnounceAfter: -1,
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

func keyOf(t testing.TB, job *queuepb.Job) blob.EntryKey {
	t.Helper()
	d, err := digest.Parse(job.ActionDigest)
	if err != nil {
		t.Fatal(err)
	}
	return blob.EntryKey{Instance: job.InstanceName, Action: d}
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
