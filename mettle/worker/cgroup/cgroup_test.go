//go:build linux

package cgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// fakeFiles are those that the kernel puts into a new group.
func fakeFiles(version int) map[string]string {
	if version == 1 {
		return map[string]string{
			tasksFile: "", procsFile: "", limitFile: "", swapToo: "", quotaFile: "", periodFile: "", pidsMaxFile: "", "pids.events": "max 0\n",
			"memory.usage_in_bytes": "4096\n", "memory.max_usage_in_bytes": "4096\n", "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n",
			"cpuacct.usage_user": "5000\n", "cpuacct.usage_sys": "7000\n",
		}
	}
	return map[string]string{
		procsFile: "", subtreeFile: "", "cgroup.controllers": "", killFile: "", "cpu.stat": "usage_usec 9\nuser_usec 5\nsystem_usec 4\n", "cpu.max": "", pidsMaxFile: "",
		"pids.events": "max 0\n", "memory.max": "", "memory.swap.max": "", "memory.oom.group": "", "memory.current": "4096\n", "memory.peak": "4096\n",
		"memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n",
	}
}

// fake is Options of a tree of plain files, which shows what is written to them.
func fake(t testing.TB, root string, version int) Options {
	t.Helper()
	return Options{Root: root, fake: true, mkdir: func(dir string) error {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		for name, text := range fakeFiles(version) {
			put(t, filepath.Join(dir, name), text)
		}
		return nil
	}}
}

// contents are the files below dir that were written to, by path, without the random
// part.
func contents(t testing.TB, dir string, names ...string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		for _, n := range names {
			if d.Name() == n {
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				rel, _ := filepath.Rel(dir, path)
				parts := strings.Split(rel, "/")
				for i, p := range parts {
					if strings.HasPrefix(p, prefix) && p != leaf {
						parts[i] = "ours"
					}
				}
				got[strings.Join(parts, "/")] = string(data)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func wantAll(t *testing.T, tree *Tree) {
	t.Helper()
	for _, c := range []Controller{Memory, CPU, Processes} {
		if err := tree.Missing(c); err != nil {
			t.Errorf("Missing(%s): %v", c, err)
		}
	}
}

func TestTree_version2(t *testing.T) {
	own := "sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/mettle.service"
	root := machine(t, systemdGroups, systemdMounts, own)
	own = filepath.Join(root, own)
	put(t, filepath.Join(own, "cgroup.controllers"), "cpu io memory pids\n")
	put(t, filepath.Join(own, subtreeFile), "")
	put(t, filepath.Join(own, typeFile), "domain\n")
	put(t, filepath.Join(own, procsFile), fmt.Sprintln(os.Getpid()))
	if os.Geteuid() == 0 {
		if err := unix.Setxattr(own, "trusted.delegate", []byte("1"), 0); err != nil {
			t.Skipf("no attributes of files here: %v", err)
		}
	}
	tree := Open(fake(t, root, 2))
	wantAll(t, tree)
	if _, err := tree.NewGroup(runner.Limits{MemoryBytes: 1 << 30, CPUs: 1.5, Processes: 100}); err != nil {
		t.Fatal(err)
	}
	if _, err := tree.NewGroup(runner.Limits{CPUs: 0.001}); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"mettle-worker/cgroup.procs": strconv.Itoa(os.Getpid()), "mettle-worker/cgroup.subtree_control": "",
		"mettle-worker/memory.max": "", "mettle-worker/memory.swap.max": "", "mettle-worker/memory.oom.group": "", "mettle-worker/cpu.max": "", "mettle-worker/pids.max": "",
		"cgroup.procs": fmt.Sprintln(os.Getpid()), "ours/cgroup.procs": "", "ours/commands1/cgroup.procs": "", "ours/commands2/cgroup.procs": "",
		// Each one that was written over the one before.
		"cgroup.subtree_control": "+pidsry", "ours/cgroup.subtree_control": "+pidsry",
		"ours/memory.max": "", "ours/cpu.max": "", "ours/pids.max": "", "ours/memory.swap.max": "", "ours/memory.oom.group": "",
		"ours/commands1/memory.max": "1073741824", "ours/commands1/memory.swap.max": "0", "ours/commands1/memory.oom.group": "1",
		"ours/commands1/cpu.max": "150000 100000", "ours/commands1/pids.max": "100", "ours/commands1/cgroup.subtree_control": "",
		"ours/commands2/memory.max": "", "ours/commands2/memory.swap.max": "", "ours/commands2/memory.oom.group": "",
		"ours/commands2/cpu.max": "1000 100000", "ours/commands2/pids.max": "", "ours/commands2/cgroup.subtree_control": "",
	}
	if diff := cmp.Diff(want, contents(t, own, procsFile, subtreeFile, "memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", pidsMaxFile)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

func TestTree_bothVersions(t *testing.T) {
	root := machine(t, hybridGroups, hybridMounts,
		"sys/fs/cgroup/cpu", "sys/fs/cgroup/cpuacct", "sys/fs/cgroup/memory/api/7e05", "sys/fs/cgroup/pids", "sys/fs/cgroup/unified")
	put(t, filepath.Join(root, "sys/fs/cgroup/unified/cgroup.controllers"), "hugetlb\n")
	tree := Open(fake(t, root, 1))
	wantAll(t, tree)
	g, err := tree.NewGroup(runner.Limits{MemoryBytes: 1 << 30, CPUs: 1.5, Processes: 100})
	if err != nil {
		t.Fatal(err)
	}
	got := contents(t, filepath.Join(root, "sys/fs/cgroup"), limitFile, quotaFile, pidsMaxFile, swapToo)
	for path, want := range map[string]string{
		"memory/api/7e05/ours/commands1/memory.limit_in_bytes":       "1073741824",
		"memory/api/7e05/ours/commands1/memory.memsw.limit_in_bytes": "1073741824",
		"cpu/ours/commands1/cpu.cfs_quota_us":                        "150000",
		"pids/ours/commands1/pids.max":                               "101", // with the helper's thread
	} {
		if got[path] != want {
			t.Errorf("%s is %q, want %q", path, got[path], want)
		}
	}
	if _, files := g.Handover(); len(files) == 0 {
		t.Error("nothing is handed over")
	}
}

func TestTree_usesNoMoreThanIsWanted(t *testing.T) {
	root := machine(t, hybridGroups, hybridMounts,
		"sys/fs/cgroup/cpu", "sys/fs/cgroup/cpuacct", "sys/fs/cgroup/memory/api/7e05", "sys/fs/cgroup/pids", "sys/fs/cgroup/unified")
	o := fake(t, root, 1)
	o.Controllers = []Controller{Memory, Processes}
	Open(o)
	for dir, want := range map[string]int{"cpu": 0, "cpuacct": 1, "memory/api/7e05": 1, "pids": 1, "unified": 0} {
		if got, _ := filepath.Glob(filepath.Join(root, "sys/fs/cgroup", dir, prefix+"*")); len(got) != want {
			t.Errorf("%s has the groups %v, want %d", dir, got, want)
		}
	}
}

func TestTree_missing(t *testing.T) {
	for _, tc := range []struct {
		name    string
		prepare func(t *testing.T, own string)
		want    string
	}{
		{"no controllers", func(*testing.T, string) {}, "no hierarchy with the controller memory"},
		{"the kernel refuses", func(t *testing.T, own string) {
			put(t, filepath.Join(own, "cgroup.controllers"), "memory\n")
			if err := os.Symlink("/proc/self/mem", filepath.Join(own, subtreeFile)); err != nil {
				t.Fatal(err)
			}
		}, "enable it"},
		{"others in the group", func(t *testing.T, own string) {
			put(t, filepath.Join(own, "cgroup.controllers"), "memory pids\n")
			put(t, filepath.Join(own, subtreeFile), "")
			put(t, filepath.Join(own, typeFile), "domain\n")
			put(t, filepath.Join(own, procsFile), fmt.Sprintf("7\n%d\n", os.Getpid()))
		}, "other processes are in the worker's group cgroup (7)"},
		{"not writable", func(t *testing.T, own string) {
			put(t, filepath.Join(own, "cgroup.controllers"), "memory\n")
		}, "cgroup.subtree_control"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := machine(t, "0::/\n", systemdMounts, "sys/fs/cgroup")
			tc.prepare(t, filepath.Join(root, "sys/fs/cgroup"))
			tree := Open(Options{Root: root, fake: true})
			err := tree.Missing(Memory)
			if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Missing: %v, want %q", err, tc.want)
			}
			if g, err := tree.NewGroup(runner.Limits{}); err != nil {
				t.Errorf("NewGroup: %v", err)
			} else if text, files := g.Handover(); text != "" || files != nil {
				t.Errorf("handed over: %q, %v", text, files)
			}
			if left, _ := filepath.Glob(filepath.Join(root, "sys/fs/cgroup", prefix+"*")); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			if err := tree.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
}

// here is the groups of this machine.
func here(t testing.TB, c Controller) *Tree {
	t.Helper()
	tree := Open(Options{})
	t.Cleanup(func() {
		if err := tree.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	if err := tree.Missing(c); err != nil {
		t.Skipf("this machine does not allow it: %v", err)
	}
	return tree
}

// enter puts a process into a group.
func enter(t testing.TB, g *Group, pid int) {
	t.Helper()
	for _, d := range g.dirs {
		if err := write(filepath.Join(d.path, procsFile), strconv.Itoa(pid)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOpen_removesWhatDeadWorkersLeft(t *testing.T) {
	dead := Open(Options{})
	if err := dead.Missing(Processes); err != nil {
		t.Skipf("this machine does not allow it: %v", err)
	}
	g, err := dead.NewGroup(runner.Limits{Processes: 10})
	if err != nil {
		t.Fatal(err)
	}
	alive := here(t, Processes)
	other, err := alive.NewGroup(runner.Limits{Processes: 10})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	enter(t, g, cmd.Process.Pid)
	for _, b := range dead.bases {
		b.lock.Close() // as a kill of the worker does
	}
	tree := here(t, Processes)
	select {
	case <-ended: //nolint:errcheck // it was killed
	case <-time.After(20 * time.Second):
		t.Error("what a dead worker left is alive")
		_ = cmd.Process.Kill()
	}
	for _, b := range dead.bases {
		if isDir(b.dir) {
			t.Errorf("%s is left", b.dir)
		}
	}
	for _, d := range other.dirs {
		if !isDir(d.path) {
			t.Errorf("%s, of a worker that is alive, was removed", d.path)
		}
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	_ = tree
}

func TestGroup_killAndClose(t *testing.T) {
	g, err := here(t, Processes).NewGroup(runner.Limits{Processes: 10})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	enter(t, g, cmd.Process.Pid)
	g.Kill()
	if err := cmd.Wait(); err == nil {
		t.Error("the process ended by itself")
	}
	dirs := g.dirs
	if err := g.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	for _, d := range dirs {
		if isDir(d.path) {
			t.Errorf("%s is left", d.path)
		}
	}
}

func TestGroup_writesTheKernelsFiles(t *testing.T) {
	g, err := here(t, CPU).NewGroup(runner.Limits{CPUs: 1.5})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for _, d := range g.dirs {
		for file, want := range map[string]string{quotaFile: "150000", periodFile: "100000", "cpu.max": "150000 100000"} {
			data, err := os.ReadFile(filepath.Join(d.path, file))
			if err == nil && strings.TrimSpace(string(data)) != want {
				t.Errorf("%s is %q, want %q", file, data, want)
			}
		}
	}
}
