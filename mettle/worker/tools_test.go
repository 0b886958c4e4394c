//go:build linux

package worker_test

import (
	"fmt"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	persistentpb "github.com/mettle-build/mettle/proto/persistent"
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
	cat in > out
	printf '{"exitCode":%s,"output":"n=%s cwd=%s inputs=%s\\n"}\n' "$(cat code)" "$n" "$PWD" "$(echo $(ls))"
	n=$((n+1))
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
