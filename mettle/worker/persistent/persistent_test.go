//go:build linux

package persistent_test

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker/persistent"
)

func sortFiles(d *repb.Directory) {
	slices.SortFunc(d.Files, func(a, b *repb.FileNode) int { return cmp.Compare(a.Name, b.Name) })
}

func sortDirectories(d *repb.Directory) {
	slices.SortFunc(d.Directories, func(a, b *repb.DirectoryNode) int { return cmp.Compare(a.Name, b.Name) })
}

func TestPool_Do(t *testing.T) {
	for _, protocol := range []string{"proto", "json"} {
		t.Run(protocol, func(t *testing.T) {
			f := newFixture(t, nil)
			var pid string
			for i := range 5 {
				a := action{protocol: protocol, files: map[string]string{"src/a": fmt.Sprint("source ", i), "src/only" + fmt.Sprint(i): "x", "tools/data": "y"}}
				res, out := f.outputs(t, a, "copy:src/a:out/a", "count:out/count", "pid:out/pid", "say:warning", "ls:out/ls", "exit:7", "unknown")
				if res.ExitCode != 7 || res.Output != "warning\n" || res.Before != int64(i) || res.Failures != 0 {
					t.Errorf("result %+v", res)
				}
				if out["a"] != fmt.Sprint("source ", i) || out["count"] != fmt.Sprint(i) {
					t.Errorf("outputs %q", out)
				}
				if pid == "" {
					pid = out["pid"]
				}
				if out["pid"] != pid {
					t.Errorf("process %s, then %s", pid, out["pid"])
				}
				want := fmt.Sprintf(". flags out out/a out/count out/pid src src/a src/only%d tools tools/data tools/lib tools/tool", i)
				if got := strings.Join(strings.Fields(out["ls"]), " "); got != want {
					t.Errorf("in the root: %s\nwant %s", got, want)
				}
				if res.Start.Before(res.Fetched) == (i > 0) || res.End.Before(res.Start) || res.Spent <= 0 {
					t.Errorf("times %+v", res)
				}
			}
			if f.starts != 1 {
				t.Errorf("%d processes", f.starts)
			}
		})
	}
}

// Tools are told apart by all that makes them what they are, and by nothing else.
func TestPool_Do_keys(t *testing.T) {
	f := newFixture(t, func(o *persistent.Options) { o.MaxProcesses = 20 })
	base := action{files: map[string]string{"src/a": "1"}}
	pids := make(map[string]string)
	for _, tc := range []struct {
		name string
		same string // as which
		action
	}{
		{"first", "", base},
		{"another source", "first", action{files: map[string]string{"src/a": "2"}}},
		{"another timeout", "first", action{timeout: time.Minute}},
		{"another argument", "", action{startup: []string{"-O2"}}},
		{"another variable", "", action{env: []string{"A=B"}}},
		{"another value", "", action{env: []string{"A=C"}}},
		{"another directory", "", action{wd: "sub"}},
		{"another protocol", "", action{protocol: "json"}},
		{"another key", "", action{change: func(r *persistent.Request) { r.Tool.Key = "other" }}},
		{"another instance", "", action{change: func(r *persistent.Request) { r.Instance = "other" }}},
		{"another place", "", action{change: func(r *persistent.Request) { r.Place = "other" }}},
		{"another tool", "", action{change: func(r *persistent.Request) { r.Root = f.otherTool(t, true) }}},
		{"not marked", "first in effect", action{unmarked: true}},
		{"not marked, another tool", "", action{unmarked: true, change: func(r *persistent.Request) { r.Root = f.otherTool(t, false) }}},
		{"first again", "first", base},
	} {
		_, out := f.outputs(t, tc.action, "pid:out/pid", "copy:"+strings.Repeat("../", strings.Count(tc.wd+"/", "/")-map[bool]int{true: 1}[tc.wd == ""])+"tools/lib:out/lib")
		if tc.same == "first in effect" {
			pids[tc.name] = out["pid"]
			continue // lib is the tool's only where the client says so
		}
		for name, pid := range pids {
			if (pid == out["pid"]) != (name == tc.same || pids[tc.same] == pid) {
				t.Errorf("%s: process %s, and that of %s is %s", tc.name, out["pid"], name, pid)
			}
		}
		pids[tc.name] = out["pid"]
	}
}

func TestPool_evictsTheOldest(t *testing.T) {
	f := newFixture(t, nil) // two
	a, b, c := action{startup: []string{"a"}}, action{startup: []string{"b"}}, action{startup: []string{"c"}}
	for i, tc := range []struct {
		action
		before int64
	}{{a, 0}, {b, 0}, {a, 1}, {c, 0}, {a, 2}, {b, 0}, {c, 0}} {
		if res, _ := f.outputs(t, tc.action); res.Before != tc.before {
			t.Errorf("action %d: %d before, want %d", i, res.Before, tc.before)
		}
		if got := f.figure(t, live, ""); got > 2 {
			t.Errorf("%v processes live", got)
		}
	}
	if got := f.figure(t, endsTotal, "evicted"); got != 3 {
		t.Errorf("%v processes evicted, want 3", got)
	}
	if got := f.figure(t, requestsTotal, "reused"); got != 2 {
		t.Errorf("%v requests to processes that had served, want 2", got)
	}
}

func TestPool_Shrink(t *testing.T) {
	f := newFixture(t, nil)
	f.outputs(t, action{})
	res, _ := f.run(t, action{startup: []string{"other"}}) // it is at work until Clean
	f.Shrink()()
	f.Shrink()()
	if got := f.figure(t, endsTotal, "memory"); got != 1 {
		t.Errorf("%v processes ended, want 1", got)
	}
	if _, err := os.Stat(res.Root); err != nil {
		t.Errorf("the root of the one that works: %v", err)
	}
	f.Clean()
	if res, _ := f.outputs(t, action{startup: []string{"other"}}); res.Before != 1 {
		t.Errorf("result %+v", res)
	}
}

func TestPool_idle(t *testing.T) {
	f := newFixture(t, func(o *persistent.Options) { o.Idle = 50 * time.Millisecond })
	f.outputs(t, action{})
	waitFor(t, func() bool { return f.figure(t, endsTotal, "idle") == 1 })
	if res, _ := f.outputs(t, action{}); res.Before != 0 {
		t.Errorf("result %+v", res)
	}
}

// otherTool is an input root with another library.
func (f *fixture) otherTool(t testing.TB, mark bool) digest.Digest {
	t.Helper()
	tool := &repb.FileNode{Name: "tool", Digest: f.program, IsExecutable: true}
	lib := &repb.FileNode{Name: "lib", Digest: f.put(t, []byte("another library"))}
	if mark {
		tool.NodeProperties, lib.NodeProperties = marked(), marked()
	}
	tools := &repb.Directory{Files: []*repb.FileNode{lib, tool}}
	if !mark {
		// The library may be anything then, the program is what counts.
		exe, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		tool.Digest = f.put(t, append(exe, 0))
	}
	root := &repb.Directory{
		Files:       []*repb.FileNode{{Name: "flags", Digest: f.put(t, []byte("pid:out/pid\ncopy:tools/lib:out/lib\n"))}},
		Directories: []*repb.DirectoryNode{{Name: "tools", Digest: f.putMessage(t, tools)}},
	}
	return toDigest(t, f.putMessage(t, root))
}
