//go:build linux

package persistent_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mettle-build/mettle/mettle/worker/persistent"
	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// wantText checks that s says all of what it is to say.
func wantText(t *testing.T, s string, says ...string) {
	t.Helper()
	for _, want := range says {
		if !strings.Contains(s, want) {
			t.Errorf("%q does not say %q", s, want)
		}
	}
}

// figure is a metric: the sum over the given label value, or all.
func (f *fixture) figure(t *testing.T, name, label string) float64 {
	t.Helper()
	families, err := f.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, fam := range families {
		if fam.GetName() != name {
			continue
		}
		for _, m := range fam.GetMetric() {
			if label != "" && m.GetLabel()[0].GetValue() != label {
				continue
			}
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}

const (
	requestsTotal = "mettle_worker_persistent_requests_total"
	endsTotal     = "mettle_worker_persistent_ends_total"
	live          = "mettle_worker_persistent_processes"
)

// What fails twice is to run plainly, and the error says why. What fails in a process
// that has served before is done by a new one.
func TestPool_Do_failures(t *testing.T) {
	for _, tc := range []struct {
		name     string
		protocol string
		startup  []string
		step     string
		says     []string
	}{
		{name: "it ends", step: "log:my last words\ndie", says: []string{"its stdout ended before it had answered", "exit code 3", `my last words\n`}},
		{name: "it is killed", step: "kill", says: []string{"exit code 137"}},
		{name: "it does not know the flag", startup: []string{"--never"}, says: []string{"exit code 2", "unknown flag"}},
		{name: "it does not listen", startup: []string{"--deaf"}, step: "say:" + strings.Repeat("x", 100_000), says: []string{"answered before it had read the request"}},
		{name: "it closes its stdout", step: "close", says: []string{"its stdout ended"}},
		{name: "another request", step: "id:7", says: []string{"it answered request 7, and was asked request 0"}},
		{name: "cancelled", step: "cancelled", says: []string{"which it was not"}},
		{name: "garbage", step: "print:\x03abc", says: []string{"is no response", `began with "\x03abc`}},
		{name: "a length of gigabytes", step: "bytes:ffffffff0f", says: []string{"too large: of 4294967295 bytes"}},
		{name: "a length without an end", step: "bytes:" + strings.Repeat("ff", 20), says: []string{"is no response", "overflow"}},
		{name: "a long response", step: "big:5000000", says: []string{"too large", "at most 1000000"}},
		{name: "json: it ends", protocol: "json", step: "die", says: []string{"its stdout ended before it had answered", "exit code 3"}},
		{name: "json: another request", protocol: "json", step: "id:7", says: []string{"it answered request 7"}},
		{name: "json: garbage", protocol: "json", step: "print:Hello, world!", says: []string{"is no response", "invalid character 'H'", `began with "Hello, world!`}},
		{name: "json: of another form", protocol: "json", step: "print:[1]", says: []string{"is no response", `began with "[1]`}},
		{name: "json: a long response", protocol: "json", step: "big:5000000", says: []string{"too large"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t, func(o *persistent.Options) { o.MaxResponseBytes = 1_000_000 })
			a := action{protocol: tc.protocol, startup: tc.startup}
			if tc.startup == nil {
				if res, _ := f.outputs(t, a, "say:fine"); res.Output != "fine\n" {
					t.Errorf("result %+v", res)
				}
			}
			res, err := f.do(t, a, strings.Split(tc.step, "\n")...)
			if !errors.Is(err, persistent.ErrPlain) || res == nil {
				t.Fatalf("error %v, want ErrPlain", err)
			}
			wantText(t, err.Error(), tc.says...)
			if got := f.figure(t, endsTotal, "failed"); got != 2 {
				t.Errorf("%v processes failed, want 2", got)
			}
			if got := f.figure(t, live, ""); got != 0 {
				t.Errorf("%v processes live", got)
			}
			_, err = f.do(t, a, "say:fine")
			switch {
			case tc.startup != nil && (!errors.Is(err, persistent.ErrPlain) || f.starts != 2):
				t.Errorf("error %v after %d starts: a tool that can't do it is tried again at once", err, f.starts)
			case tc.startup == nil && (err != nil || f.starts != 3):
				t.Errorf("error %v after %d starts: a tool that can do it is not tried again", err, f.starts)
			}
		})
	}
}

func TestPool_Do_retries(t *testing.T) {
	f := newFixture(t, nil)
	f.outputs(t, action{})
	res, out := f.outputs(t, action{}, "write:out/left:x", "die-if-reused", "remove:out/left", "count:out/count")
	if res.Failures != 1 || res.Before != 0 || out["count"] != "0" || f.starts != 2 {
		t.Errorf("result %+v, %q, %d starts", res, out, f.starts)
	}
	wantText(t, f.log.String(), "a persistent worker failed", "exit code 3")
	if res, _ := f.outputs(t, action{}); res.Before != 1 {
		t.Errorf("result %+v: the new process is not kept", res)
	}
}

// A process that ends or speaks while it has nothing to do is no trouble.
func TestPool_Do_idleFailures(t *testing.T) {
	for _, tc := range []struct{ name, protocol, step, says string }{
		{"it ends", "proto", "after-die", "ended"},
		{"it speaks", "proto", "after-print:more", "unasked"},
		{"json: it speaks", "json", "after-print:more", "unasked"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t, nil)
			a := action{protocol: tc.protocol}
			f.outputs(t, a, tc.step)
			// Until it has done so: there is nothing else to wait for.
			time.Sleep(300 * time.Millisecond)
			if res, _ := f.outputs(t, a); res.Before != 0 || res.Failures != 0 || f.starts != 2 {
				t.Errorf("result %+v after %d starts", res, f.starts)
			}
			wantText(t, f.log.String(), tc.says)
		})
	}
}

// A blank line after a response is none.
func TestPool_Do_jsonBlankLines(t *testing.T) {
	f := newFixture(t, nil)
	for i := range int64(3) {
		if res, _ := f.outputs(t, action{protocol: "json"}, "after-print:\n \n"); res.Before != i {
			t.Errorf("result %+v", res)
		}
	}
}

func TestPool_Do_timeout(t *testing.T) {
	f := newFixture(t, nil)
	for _, tc := range []struct {
		steps []string
		says  string
	}{
		{[]string{"write:out/so-far:x", "print:Hi", "log:thinking", "hang"}, `ended with "thinking\n"`},
		{[]string{"silent"}, "did not answer"},
		{[]string{"print:Hello, world", "hang"}, `began with "Hello, world"`},
	} {
		f.outputs(t, action{}, "say:ready") // so that the time is not that of its start
		defer f.Clean()
		res, err := f.Do(t.Context(), f.request(t, action{timeout: 300 * time.Millisecond}, tc.steps...))
		if !errors.Is(err, persistent.ErrTimeout) || errors.Is(err, persistent.ErrPlain) {
			t.Fatalf("error %v, want ErrTimeout", err)
		}
		wantText(t, err.Error(), tc.says)
		if tc.steps[0] == "write:out/so-far:x" {
			if _, err := os.Stat(filepath.Join(res.Root, "out", "so-far")); err != nil {
				t.Errorf("what it has made is gone: %v", err)
			}
		}
		f.Clean()
		if got := f.figure(t, live, ""); got != 0 {
			t.Errorf("%v processes live", got)
		}
	}
	if got := f.figure(t, endsTotal, "killed"); got != 3 {
		t.Errorf("%v processes killed, want 3", got)
	}
}

func TestPool_Do_cancelled(t *testing.T) {
	f := newFixture(t, nil)
	f.outputs(t, action{})
	cause := errors.New("nobody wants it")
	ctx, cancel := context.WithCancelCause(t.Context())
	req := f.request(t, action{}, "hang")
	time.AfterFunc(200*time.Millisecond, func() { cancel(cause) })
	if _, err := f.Do(ctx, req); !errors.Is(err, cause) || errors.Is(err, persistent.ErrPlain) {
		t.Errorf("error %v, want the cause", err)
	}
	f.Clean()
	if _, err := f.Do(ctx, req); !errors.Is(err, cause) {
		t.Errorf("error %v, want the cause", err)
	}
	f.Clean()
	if res, _ := f.outputs(t, action{}); res.Before != 0 {
		t.Errorf("result %+v of the process that was killed", res)
	}
}

// An action that can't be had leaves the process for the next.
func TestPool_Do_unfitAction(t *testing.T) {
	for _, tc := range []struct {
		name, says string
		action     action
		steps      []string
	}{
		{"a flag file that is not there", "nowhere", action{change: func(r *persistent.Request) { r.Tool.FlagFiles = []string{"@nowhere"} }}, nil},
		{"a flag file outside", "escapes", action{change: func(r *persistent.Request) { r.Tool.FlagFiles = []string{"@../../x"} }}, nil},
		{"a directory as a flag file", "no file", action{change: func(r *persistent.Request) { r.Tool.FlagFiles = []string{"@tools"} }}, nil},
		{"flag files in a circle", "within each other", action{}, []string{"@flags"}},
		{"what is not UTF-8", "UTF-8", action{}, []string{"say:\xff"}},
		{"inputs that are missing", "not found", action{change: func(r *persistent.Request) { r.Root = missingInput(r.Root.Function()) }}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t, nil)
			f.outputs(t, action{})
			_, err := f.do(t, tc.action, tc.steps...)
			if !errors.Is(err, persistent.ErrPlain) {
				t.Fatalf("error %v, want ErrPlain", err)
			}
			wantText(t, err.Error(), tc.says)
			res, out := f.outputs(t, action{}, "ls:out/ls")
			if res.Before != 1 || strings.Contains(out["ls"], "src") {
				t.Errorf("result %+v, in the root %q", res, out["ls"])
			}
		})
	}
}

// No file of an action is there when the next comes, and the tool's own are as they
// were.
func TestPool_Clean(t *testing.T) {
	deep := []string{"write:out/x:x", "write:more:x", "mkdir:d", "mkdir:d/e", "write:d/e/f:x", "link:/etc:etc", "link:..:tools/up", "write:tools/new:x", "mkdir:tools/d"}
	for _, tc := range []struct {
		name  string
		steps []string
		ended bool
	}{
		{"files and directories", deep, false},
		{"a directory that only root can enter", []string{"mkdir:d", "write:d/f:x", "mode:d:0"}, os.Getuid() != 0},
		{"an input", []string{"remove:src/a", "mkdir:src/a"}, false},
		{"nothing", nil, false},
		{"a tool file removed", []string{"remove:tools/lib"}, true},
		{"a tool file replaced", []string{"replace:tools/lib"}, true},
		{"its program replaced", []string{"replace:tools/tool"}, true},
		{"its directory's mode", []string{"mode:tools:700"}, true},
		{"its directory removed", []string{"remove:tools"}, true},
		{"its directory is a FIFO", []string{"remove:tools", "fifo:tools"}, true},
		{"its root's mode", []string{"mode:.:700"}, true},
		{"files at all times", []string{"write-on"}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t, nil)
			a := action{files: map[string]string{"src/a": "x", "tools/data": "y"}}
			res, _ := f.outputs(t, a, tc.steps...)
			if res.ExitCode != 0 {
				t.Fatalf("result %+v", res)
			}
			if slices.Contains(tc.steps, "write-on") {
				waitFor(t, func() bool {
					left, _ := filepath.Glob(filepath.Join(res.Root, "extra*"))
					return len(left) > 0 || f.figure(t, live, "") == 0
				})
			}
			after, out := f.outputs(t, action{files: map[string]string{"src/b": "x"}}, "ls:out/ls")
			want := ". flags out src src/b tools tools/lib tools/tool"
			if got := strings.Join(strings.Fields(out["ls"]), " "); got != want {
				t.Errorf("in the root: %s\nwant %s", got, want)
			}
			if (after.Before == 0) != tc.ended {
				t.Errorf("result %+v", after)
			}
			if got := f.figure(t, endsTotal, "changed"); (got == 1) != tc.ended {
				t.Errorf("%v processes ended for a change", got)
			}
		})
	}
}

// A tool that puts something in the way of the next action's inputs harms nobody
// else.
func TestPool_Do_inTheWay(t *testing.T) {
	f := newFixture(t, nil)
	victim := filepath.Join(f.dir, "victim")
	if err := os.Mkdir(victim, 0o777); err != nil { //nolint:gosec // it is to be reached
		t.Fatal(err)
	}
	// The writer goes on after Clean has looked, now and then.
	f.outputs(t, action{}, "link:"+victim+":src")
	res, out := f.outputs(t, action{files: map[string]string{"src/b": "x"}}, "copy:src/b:out/b")
	if out["b"] != "x" || res.Root == "" {
		t.Errorf("outputs %q", out)
	}
	if left, _ := os.ReadDir(victim); len(left) > 0 {
		t.Errorf("%v is where the tool's symlink led", left)
	}
}

// Nothing that a tool starts outlives it.
func TestPool_Close_daemons(t *testing.T) {
	f := newFixture(t, nil)
	f.outputs(t, action{}, "daemon", "daemon")
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	all, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, link := range all {
		if wd, err := os.Readlink(link); err == nil && strings.HasPrefix(wd, f.dir) {
			t.Errorf("%s is in %s", link, wd)
		}
	}
	if _, err := f.do(t, action{}); !errors.Is(err, persistent.ErrPlain) {
		t.Errorf("error %v after Close", err)
	}
}

func TestPool_Do_killedFromOutside(t *testing.T) {
	f := newFixture(t, nil)
	_, out := f.outputs(t, action{}, "pid:out/pid")
	var pid int
	if _, err := fmt.Sscan(out["pid"], &pid); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if res, _ := f.outputs(t, action{}); res.Before != 0 || res.Failures > 1 {
		t.Errorf("result %+v", res)
	}
}

// Where no process can be started, actions run plainly.
func TestPool_Do_noRunner(t *testing.T) {
	f := newFixture(t, nil)
	no := func(*runner.Streams) (runner.Runner, error) { return nil, errors.New("no room") }
	_, err := f.do(t, action{change: func(r *persistent.Request) { r.Start = no }})
	if !errors.Is(err, persistent.ErrPlain) {
		t.Fatalf("error %v, want ErrPlain", err)
	}
	wantText(t, err.Error(), "no room")
	f.outputs(t, action{})
}

// waitFor waits for something that only its effect tells of.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(start) > 20*time.Second {
			t.Fatal("waited for too long")
		}
	}
}
