//go:build linux

package worker_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	codepb "google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/image"
	persistentpb "github.com/mettle-build/mettle/proto/persistent"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// shellTool is a tool that speaks the worker protocol, in JSON. Plain, it says so.
const shellTool = `#!/bin/sh
case "$*" in
*--persistent_worker*) ;;
*) echo "plain: $(cat flags)" >&2; echo plain > out; exit 0;;
esac
n=0
while read -r line; do
	case "$line" in *die*) echo "about to die" >&2; exit 3;; esac
	case "$line" in *hang*) sleep 1000;; esac
	case "$line" in *hold*) exec 3>out;; esac
	cat in > out
	printf '{"exitCode":%s,"output":"n=%s cwd=%s inputs=%s%s\\n"}\n' "$(cat code)" "$n" "$PWD" "$(echo $(ls))" "$(cat /mark 2> /dev/null)"
	n=$((n+1))
	case "$line" in *hold*) sleep 0.3; echo evil >&3; echo evil > later;; esac
done
`

// tools makes each slot keep one tool.
func tools(o *worker.Options, _ *mem.Options) { o.PersistentWorkers, o.Slots = 1, 1 }

// toolRequest is an action for shellTool.
func (f *fixture) toolRequest(t testing.TB, flags, in, code string) request {
	t.Helper()
	return request{
		root: &repb.Directory{Files: []*repb.FileNode{
			{Name: "code", Digest: f.put(t, code)},
			{Name: "flags", Digest: f.put(t, flags)},
			{Name: "in", Digest: f.put(t, in)},
			{Name: "tool", Digest: f.put(t, shellTool), IsExecutable: true},
		}},
		command: &repb.Command{
			Arguments:            []string{"./tool", "@flags"},
			EnvironmentVariables: []*repb.Command_EnvironmentVariable{{Name: "PATH", Value: "/usr/bin:/bin"}},
			OutputPaths:          []string{"out"},
		},
		action: &repb.Action{Platform: &repb.Platform{Properties: []*repb.Platform_Property{
			{Name: "persistentWorkerKey", Value: "any"}, {Name: "persistentWorkerProtocol", Value: "json"},
		}}},
	}
}

// use is what a result says of the process that it came from.
func use(t testing.TB, r *repb.ActionResult) *persistentpb.Use {
	t.Helper()
	for _, a := range r.GetExecutionMetadata().GetAuxiliaryMetadata() {
		u := &persistentpb.Use{}
		if a.MessageIs(u) {
			if err := a.UnmarshalTo(u); err != nil {
				t.Fatal(err)
			}
			return u
		}
	}
	return nil
}

func TestWorker_persistent(t *testing.T) {
	f := newFixture(t, isolated(t), tools).start(t)
	for i := range 3 {
		in := fmt.Sprint("input ", i)
		r := f.run(t, f.toolRequest(t, "x", in, "0"), 0)
		if got := f.read(t, r.OutputFiles[0].Digest); got != in {
			t.Errorf("output %q, want %q", got, in)
		}
		want := fmt.Sprintf("n=%d cwd=/build inputs=code flags in out tool", i)
		if got := strings.Join(strings.Fields(string(r.StderrRaw)), " "); got != want {
			t.Errorf("stderr %q, want %q", got, want)
		}
		if u := use(t, r); u == nil || u.RequestsBefore != int64(i) || u.Failures != 0 {
			t.Errorf("it is said to have come from %v", u)
		}
		checkMetadata(t, r.ExecutionMetadata)
	}
	resp := f.execute(t, f.toolRequest(t, "x", "", "5"))
	if resp.Result.ExitCode != 5 || !strings.Contains(resp.Message, "in a persistent worker that had answered 3 requests before") {
		t.Errorf("exit code %d, message %q", resp.Result.ExitCode, resp.Message)
	}
}

func TestWorker_persistent_fallsBack(t *testing.T) {
	f := newFixture(t, isolated(t), tools).start(t)
	r := f.run(t, f.toolRequest(t, "die", "", "0"), 0)
	if got := string(r.StderrRaw); got != "plain: die\n" {
		t.Errorf("stderr %q", got)
	}
	if u := use(t, r); u != nil {
		t.Errorf("it is said to have come from %v", u)
	}
	req := f.toolRequest(t, "x", "", "0")
	req.action.Platform.Properties[1].Value = "xml"
	resp := f.execute(t, req)
	if string(resp.Result.StderrRaw) != "plain: x\n" || !strings.Contains(resp.Message, `worker protocol "xml"`) {
		t.Errorf("stderr %q, message %q", resp.Result.StderrRaw, resp.Message)
	}
}

func TestWorker_persistent_notMarked(t *testing.T) {
	f := newFixture(t, isolated(t), tools).start(t)
	req := f.toolRequest(t, "x", "", "0")
	req.action.Platform = nil
	if got := string(f.run(t, req, 0).StderrRaw); got != "plain: x\n" {
		t.Errorf("stderr %q", got)
	}
	req = f.toolRequest(t, "x", "", "0")
	req.command.Platform = proto.CloneOf(req.action.Platform) // clients of API 2.1 and before
	req.action.Platform = nil
	if got := string(f.run(t, req, 0).StderrRaw); !strings.HasPrefix(got, "n=0 ") {
		t.Errorf("stderr %q", got)
	}
}

// Without a sandbox, a tool that lives on would be among other actions.
func TestWorker_persistent_bare(t *testing.T) {
	f := newFixture(t, tools, func(o *worker.Options, _ *mem.Options) { o.Isolation = worker.Bare }).start(t)
	if got := string(f.run(t, f.toolRequest(t, "x", "", "0"), 0).StderrRaw); got != "plain: x\n" {
		t.Errorf("stderr %q", got)
	}
}

// What a tool writes to an output after it has answered changes nothing: neither what
// was returned nor, once it is found out, what comes next.
func TestWorker_persistent_holdsOutputs(t *testing.T) {
	f := newFixture(t, isolated(t), tools).start(t)
	r := f.run(t, f.toolRequest(t, "hold", "good", "0"), 0)
	roots := filepath.Join(f.dir, "slot0", "persistent", "*", "root", "later")
	waitFor(t, func() bool {
		found, _ := filepath.Glob(roots)
		return len(found) > 0
	})
	if got := f.read(t, r.OutputFiles[0].Digest); got != "good" {
		t.Errorf("the output is %q now", got)
	}
	r = f.run(t, f.toolRequest(t, "x", "next", "0"), 0)
	if u := use(t, r); u == nil || u.RequestsBefore != 0 {
		t.Errorf("the next came from %v", u)
	}
	if got := f.read(t, r.OutputFiles[0].Digest); got != "next" {
		t.Errorf("the next output is %q", got)
	}
}

func TestWorker_persistent_timeout(t *testing.T) {
	f := newFixture(t, isolated(t), tools).start(t)
	f.run(t, f.toolRequest(t, "x", "", "0"), 0)
	req := f.toolRequest(t, "hang", "", "0")
	req.action.Timeout = durationpb.New(300 * time.Millisecond)
	resp := f.execute(t, req)
	if got := codepb.Code(resp.Status.GetCode()); got != codepb.Code_DEADLINE_EXCEEDED {
		t.Errorf("status %v", resp.Status)
	}
	for _, want := range []string{"ran for longer than 300ms", "process was killed"} {
		if !strings.Contains(resp.Message, want) {
			t.Errorf("message %q does not say %q", resp.Message, want)
		}
	}
	r := f.run(t, f.toolRequest(t, "x", "", "0"), 0)
	if u := use(t, r); u == nil || u.RequestsBefore != 0 {
		t.Errorf("the next came from %v", u)
	}
}

func TestWorker_persistent_cancelled(t *testing.T) {
	f := newFixture(t, isolated(t), tools).start(t)
	f.run(t, f.toolRequest(t, "x", "", "0"), 0)
	job := f.publish(t, f.toolRequest(t, "hang", "", "0"))
	roots := filepath.Join(f.dir, "slot0", "persistent", "*", "root", "flags")
	waitFor(t, func() bool {
		found, _ := filepath.Glob(roots)
		return len(found) > 0
	})
	if err := f.queue.Cancel(t.Context(), job.Operation); err != nil {
		t.Fatal(err)
	}
	if got := codepb.Code(f.wait(t, job).Status.GetCode()); got != codepb.Code_CANCELLED {
		t.Errorf("status %v", got)
	}
	f.run(t, f.toolRequest(t, "x", "", "0"), 0)
}

// Each slot has tools of its own, and plain actions between do not touch them.
func TestWorker_persistent_slots(t *testing.T) {
	f := newFixture(t, isolated(t), tools, func(o *worker.Options, _ *mem.Options) { o.Slots = 2 }).start(t)
	var jobs []*queuepb.Job
	var wants []string
	for i := range 20 {
		wants = append(wants, fmt.Sprint("input ", i))
		if i%3 == 0 {
			jobs = append(jobs, f.publish(t, request{script: "printf 'input " + fmt.Sprint(i) + "' > out; ls -A / > /dev/null; kill -9 -1 2> /dev/null; true", command: &repb.Command{OutputPaths: []string{"out"}}}))
			continue
		}
		jobs = append(jobs, f.publish(t, f.toolRequest(t, "x", wants[i], "0")))
	}
	started := 0
	for i, resp := range f.waitAll(t, jobs) {
		if i%3 == 0 {
			continue // it has killed itself
		}
		if got := f.read(t, resp.Result.OutputFiles[0].Digest); got != wants[i] {
			t.Errorf("output %q, want %q", got, wants[i])
		}
		if u := use(t, resp.Result); u == nil || u.Failures > 0 {
			t.Errorf("it came from %v", u)
		} else if u.RequestsBefore == 0 {
			started++
		}
	}
	if started < 1 || started > 2 {
		t.Errorf("%d processes, want one for each slot", started)
	}
}

// waitAll is wait for jobs that end in any order.
func (f *fixture) waitAll(t *testing.T, jobs []*queuepb.Job) []*repb.ExecuteResponse {
	t.Helper()
	index := make(map[string]int)
	for i, j := range jobs {
		index[j.Operation] = i
	}
	all := make([]*repb.ExecuteResponse, len(jobs))
	for left := len(jobs); left > 0; {
		select {
		case u := <-f.updates:
			i, ok := index[u.Operation]
			if !ok || u.Stage != queuepb.Update_COMPLETED {
				continue
			}
			all[i] = &repb.ExecuteResponse{}
			if err := proto.Unmarshal(u.ExecuteResponse, all[i]); err != nil {
				t.Fatal(err)
			}
			left--
		case <-time.After(30 * time.Second):
			t.Fatal("no response within 30 s")
		}
	}
	return all
}

func TestWorker_persistent_image(t *testing.T) {
	im := newImages(t, image.Options{})
	refs := []string{
		im.push(t, "one", map[string]string{"mark": " one"}),
		im.push(t, "two", map[string]string{"mark": " two"}),
	}
	f := newFixture(t, isolated(t), tools, inImages(t, im)).start(t)
	for i := range 4 {
		req := f.toolRequest(t, "x", "", "0")
		req.action.Platform.Properties = append(req.action.Platform.Properties, asking(refs[i/2]).Platform.Properties...)
		resp := f.execute(t, req)
		r := resp.Result
		if want := []string{" one", " two"}[i/2]; !strings.HasSuffix(string(r.StderrRaw), want+"\n") {
			t.Errorf("stderr %q, want it to end with %q", r.StderrRaw, want)
		}
		if u := use(t, r); u == nil || u.RequestsBefore != int64(i%2) {
			t.Errorf("it came from %v: %s", u, resp.Message)
		}
	}
}
