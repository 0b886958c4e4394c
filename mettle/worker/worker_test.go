//go:build linux

package worker_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestWorker_trivial(t *testing.T) {
	f := newFixture(t).start(t)
	r := f.run(t, request{command: &repb.Command{Arguments: []string{"/bin/true"}}}, 0)
	if r.StdoutDigest != nil || r.StderrDigest != nil || len(r.OutputFiles) != 0 {
		t.Errorf("result %v, want nothing but metadata", r)
	}
	checkMetadata(t, r.ExecutionMetadata)
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
	where := f.dir
	if allIsolated() {
		where = "/build/w"
	}
	if !strings.HasPrefix(string(r.StderrRaw), "err\n"+where) || !strings.HasSuffix(string(r.StderrRaw), "/w\n") {
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

func TestWorker_timeout(t *testing.T) {
	f := newFixture(t).start(t)
	resp := f.execute(t, request{
		script:  "echo partial; echo result > out; (setsid sleep 1000 &); sleep 1000",
		command: &repb.Command{OutputPaths: []string{"out"}},
		job:     &queuepb.Job{Timeout: durationpb.New(300 * time.Millisecond)},
	})
	// siso knows a timeout of the action by these words alone.
	if codes.Code(resp.Status.GetCode()) != codes.DeadlineExceeded || resp.Status.Message != "execution timeout exceeded" {
		t.Errorf("status %v, want DEADLINE_EXCEEDED", resp.Status)
	}
	if !strings.Contains(resp.Message, "longer than 300ms") {
		t.Errorf("the message is %q", resp.Message)
	}
	if string(resp.Result.GetStdoutRaw()) != "partial\n" || len(resp.Result.GetOutputFiles()) != 1 || resp.Result.ExitCode == 0 {
		t.Errorf("result %v, want what there was", resp.Result)
	}
	if d := resp.Result.ExecutionMetadata.VirtualExecutionDuration.AsDuration(); d < 290*time.Millisecond || d > 20*time.Second { // by two clocks
		t.Errorf("virtual_execution_duration %v", d)
	}
	checkMetadata(t, resp.Result.ExecutionMetadata)
	f.wantNoProcesses(t)
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

// smallStore is too small for a blob of maxBytes and more.
type smallStore struct {
	blob.Store
	maxBytes int64
}

func (s smallStore) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	if d.Size() >= s.maxBytes {
		return nil, fmt.Errorf("create blob %s: %w: the store holds %d bytes", d, blob.ErrTooLarge, s.maxBytes)
	}
	return s.Store.Create(ctx, d)
}

// TestWorker_storeTooSmall: no client could put an action right for which the store
// has too little room, so that it is not told that its arguments are invalid.
func TestWorker_storeTooSmall(t *testing.T) {
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.Store = smallStore{o.Store, 100_000} }).start(t)
	for name, r := range map[string]request{
		"a file":      {script: "head -c 100000 /dev/zero >out; echo log", command: &repb.Command{OutputPaths: []string{"out"}}},
		"a directory": {script: "mkdir out; head -c 100000 /dev/zero >out/a; echo log", command: &repb.Command{OutputPaths: []string{"out"}}},
	} {
		t.Run(name, func(t *testing.T) {
			resp := f.execute(t, r)
			if codes.Code(resp.Status.GetCode()) != codes.ResourceExhausted || !strings.Contains(resp.Status.GetMessage(), "the storage has no room for an output") {
				t.Errorf("status %v, want RESOURCE_EXHAUSTED and why", resp.Status)
			}
		})
	}
	f.run(t, request{script: "true"}, 0)
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
