//go:build linux

package runnertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/cgroup"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
)

// hog takes all the memory that it gets, within bounds that do not depend on what is
// tested.
const hog = "ulimit -v 1000000; exec tail /dev/zero"

const mib = 1 << 20

// RunLimits runs the tests of limits.
func RunLimits(t *testing.T, s Subject) {
	for _, c := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"memory", s.memory},
		{"memoryOfAGrandchild", s.memoryOfAGrandchild},
		{"peakMemory", s.peakMemory},
		{"processes", s.processes},
		{"processesByUser", s.processesByUser},
		{"boundedWorker", s.boundedWorker},
		{"cpuTimeOfAll", s.cpuTimeOfAll},
		{"cpuLimit", s.cpuLimit},
		{"diskByOneFile", s.diskByOneFile},
		{"diskByManyFiles", s.diskByManyFiles},
		{"diskUnderQuota", s.diskUnderQuota},
		{"helperKilledInGroup", s.helperKilledInGroup},
	} {
		t.Run(c.name, c.run)
	}
}

// bounded is a Bench whose commands are held to limits, by a group where one of cs is
// wanted.
func (s Subject) bounded(t testing.TB, l runner.Limits, cs ...cgroup.Controller) *Bench {
	t.Helper()
	b := helper.Bounds{Limits: l}
	if len(cs) > 0 {
		tree := cgroup.Open(cgroup.Options{Controllers: append([]cgroup.Controller{cgroup.Processes}, cs...)})
		t.Cleanup(func() {
			if err := tree.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
		for _, c := range cs {
			if err := tree.Missing(c); err != nil {
				t.Skipf("this machine does not allow it: %v", err)
			}
		}
		var err error
		if b.Group, err = tree.NewGroup(l); err != nil {
			t.Fatal(err)
		}
	}
	return s.NewBoundedBench(t, b)
}

// wantUnharmed checks that the next command is none the worse for the last.
func (b *Bench) wantUnharmed(t *testing.T) {
	t.Helper()
	for range 2 {
		res := b.Do(t, "sh", "-c", "echo fine; (sleep 0; echo more)")
		if res.ExitCode != 0 || b.StdoutText(t) != "fine\nmore\n" || b.StderrText(t) != "" || len(res.Notes) > 0 {
			t.Errorf("the next command: exit code %d, stdout %q, stderr %q, notes %q", res.ExitCode, b.StdoutText(t), b.StderrText(t), res.Notes)
		}
	}
}

// runEnded runs a command that a limit is to end.
func (b *Bench) runEnded(t *testing.T, want error, script string) runner.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	b.Spec.Args = []string{"sh", "-c", script}
	res, err := b.Run(ctx, b.Spec)
	if !errors.Is(err, want) || res.ExitCode != 137 || len(res.Notes) == 0 {
		t.Errorf("Run: %v, exit code %d, notes %q, stderr %q; want %v, 137", err, res.ExitCode, res.Notes, b.StderrText(t), want)
	}
	lines := strings.Split(strings.TrimSpace(b.StderrText(t)), "\n")
	if last := lines[len(lines)-1]; len(res.Notes) > 0 && last != "mettle: "+res.Notes[0] {
		t.Errorf("the last line of stderr is %q, want the note %q", last, res.Notes[0])
	}
	if st, err := os.Stat(b.Spec.Stderr); err != nil || st.Size() != res.StderrBytes {
		t.Errorf("stderr has %d bytes, %v, want %d", st.Size(), err, res.StderrBytes)
	}
	return res
}

func (s Subject) memory(t *testing.T) {
	b := s.bounded(t, runner.Limits{MemoryBytes: 64 * mib}, cgroup.Memory)
	for range 3 {
		res := b.runEnded(t, runner.ErrOutOfMemory, "printf partial >&2; "+hog)
		if !strings.Contains(b.StderrText(t), "partial\nmettle: out of memory: this action may use 64 MiB") {
			t.Errorf("stderr %q", b.StderrText(t))
		}
		if p := res.Usage.PeakMemoryBytes; p < 30*mib || p > 70*mib { // of processes, with what they share
			t.Errorf("peak memory %d, want about 64 MiB", p)
		}
	}
	b.wantUnharmed(t)
}

// What a process that failed for want of memory should have made is missing, whatever
// the command says.
func (s Subject) memoryOfAGrandchild(t *testing.T) {
	b := s.bounded(t, runner.Limits{MemoryBytes: 64 * mib}, cgroup.Memory)
	res := b.runEnded(t, runner.ErrOutOfMemory, "sh -c '("+hog+") || true'; exit 0")
	if text := strings.Join(res.Notes, "\n"); !strings.Contains(text, "killed") {
		t.Errorf("notes %q", text)
	}
	b.wantUnharmed(t)
}

func (s Subject) peakMemory(t *testing.T) {
	b := s.bounded(t, runner.Limits{}, cgroup.Memory)
	// Two processes at one time, each below what both are: tail prints when it has all,
	// and the first byte of each is waited for. Then there is time to look, where the
	// kernel does not tell of a peak.
	b.Do(t, "sh", "-c", "sleep 0.01")
	res := b.Do(t, "sh", "-c", `h() {
		head -c 40000000 /dev/zero | tail -c 40000000 | (
			head -c 1 >/dev/null; : >"has.$1"
			i=0; while [ $i -lt 3000 ] && ! { [ -e has.a ] && [ -e has.b ]; }; do sleep 0.01; i=$((i+1)); done
			sleep 0.3; wc -c
		)
	}; h a & h b & wait`)
	if p, rss := res.Usage.PeakMemoryBytes, res.Usage.MaxRSSBytes; p < 70*mib || p > 200*mib || rss > p {
		t.Errorf("peak memory of all %d, of one %d; want about 80 MB", p, rss)
	}
	if res := b.Do(t, "true"); res.Usage.PeakMemoryBytes > 20*mib {
		t.Errorf("then peak memory of a small command: %d", res.Usage.PeakMemoryBytes)
	}
}

// forks tries to have 300 processes at once, and no more.
const forks = `i=0; while [ $i -lt 300 ]; do sleep 20 & i=$((i+1)); done; echo all`

func (s Subject) processes(t *testing.T) {
	b := s.bounded(t, runner.Limits{Processes: 50}, cgroup.Processes)
	res := b.Do(t, "sh", "-c", forks)
	if res.ExitCode == 0 || strings.Contains(b.StdoutText(t), "all") {
		t.Errorf("exit code %d, stdout %q", res.ExitCode, b.StdoutText(t))
	}
	if notes := strings.Join(res.Notes, "\n"); !strings.Contains(notes, "may have 50 processes") {
		t.Errorf("notes %q", res.Notes)
	}
	b.wantUnharmed(t)
	// As many as there may be, there can be.
	if res := b.Do(t, "sh", "-c", strings.ReplaceAll(forks, "300", "40")); b.StdoutText(t) != "all\n" {
		t.Errorf("40 processes: exit code %d, stderr %q", res.ExitCode, b.StderrText(t))
	}
}

func (s Subject) processesByUser(t *testing.T) {
	if os.Getuid() != 0 && s.Root == "" {
		t.Skip("the user of the command has other processes")
	}
	b := s.NewBoundedBench(t, helper.Bounds{Limits: runner.Limits{Processes: 50}, CountUser: true})
	res := b.Do(t, "sh", "-c", forks)
	if res.ExitCode == 0 || strings.Contains(b.StdoutText(t), "all") {
		t.Errorf("exit code %d, stdout %q", res.ExitCode, b.StdoutText(t))
	}
	b.wantUnharmed(t)
}

// A worker that may have fewer processes than an action should, as in a container
// with a ulimit, runs actions within its own bound, which it can not raise.
func (s Subject) boundedWorker(t *testing.T) {
	var now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &now); err != nil {
		t.Fatal(err)
	}
	// One less than before, for all of this process, and far from what tests need.
	now.Max = min(now.Max-1, 1<<20)
	now.Cur = min(now.Cur, now.Max)
	if err := unix.Setrlimit(unix.RLIMIT_NPROC, &now); err != nil {
		t.Fatal(err)
	}
	b := s.NewBoundedBench(t, helper.Bounds{Limits: runner.Limits{Processes: int(now.Max) + 100}, CountUser: true}) //nolint:gosec // at most 1<<20
	if res := b.Do(t, "sh", "-c", "ulimit -p 2>/dev/null || ulimit -u"); b.StdoutText(t) != fmt.Sprintln(now.Max) {
		t.Errorf("exit code %d, bound %q, want the worker's own, %d", res.ExitCode, b.StdoutText(t), now.Max)
	}
}

// What nobody waited for counts as well.
func (s Subject) cpuTimeOfAll(t *testing.T) {
	b := s.bounded(t, runner.Limits{}, cgroup.Memory)
	res := b.Do(t, "sh", "-c", `(i=0; while [ $i -lt 150000 ]; do i=$((i+1)); done; touch done; exec sleep 100) & until [ -e done ]; do sleep 0.01; done`)
	if u := res.Usage; u.UserTime < 10*time.Millisecond {
		t.Errorf("user time %v, want that of the process that was killed, too", u.UserTime)
	}
}

func (s Subject) cpuLimit(t *testing.T) {
	b := s.bounded(t, runner.Limits{CPUs: 0.1}, cgroup.CPU)
	res := b.Do(t, "sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
	took, used := res.End.Sub(res.Start), res.Usage.UserTime+res.Usage.SystemTime
	if used < 12*time.Millisecond || took < 2*used {
		t.Errorf("it used %v of CPU time within %v, want a tenth", used, took)
	}
	b.wantUnharmed(t)
}

func (s Subject) diskByOneFile(t *testing.T) {
	for name, script := range map[string]string{
		"signal":  "exec head -c 100000000 /dev/zero > big",
		"sparse":  "exec truncate -s 100M big",
		"ignored": "trap '' XFSZ; head -c 100000000 /dev/zero > big; exit 3",
		"slow":    "trap '' XFSZ; i=0; while [ $i -lt 40 ]; do head -c 1000000 /dev/zero > f$i; i=$((i+1)); done; sleep 100",
	} {
		t.Run(name, func(t *testing.T) {
			b := s.bounded(t, runner.Limits{DiskBytes: 20 * mib})
			b.runEnded(t, runner.ErrDiskQuota, script)
			if st, err := os.Stat(filepath.Join(b.Dir, "big")); err == nil && st.Size() > 21*mib {
				t.Errorf("the file has %d bytes", st.Size())
			}
			b.wantUnharmed(t)
		})
	}
}

func (s Subject) diskByManyFiles(t *testing.T) {
	for name, script := range map[string]string{
		"flat":       "i=0; while [ $i -lt 60 ]; do head -c 500000 /dev/zero > f$i; i=$((i+1)); done; sleep 100",
		"deep":       "i=0; while [ $i -lt 60 ]; do mkdir d; cd d; head -c 500000 /dev/zero > f; i=$((i+1)); done; sleep 100",
		"links":      "i=0; while [ $i -lt 60 ]; do head -c 500000 /dev/zero > f$i; ln f$i g$i; i=$((i+1)); done; sleep 100",
		"unlinked":   "for n in 1 2 3 4 5 6; do (exec 3> f$n; rm f$n; head -c 5000000 /dev/zero >&3; exec sleep 100) & done; sleep 100",
		"unreadable": "mkdir d; cd d; i=0; while [ $i -lt 60 ]; do head -c 500000 /dev/zero > f$i; i=$((i+1)); done; chmod 0 .; sleep 100",
	} {
		t.Run(name, func(t *testing.T) {
			if (name == "unreadable" || name == "unlinked") && os.Getuid() != 0 && s.Root == "" {
				t.Skip("the helper may read no more than the command")
			}
			b := s.bounded(t, runner.Limits{DiskBytes: 20 * mib})
			b.runEnded(t, runner.ErrDiskQuota, script)
			b.wantUnharmed(t)
			_ = os.Chmod(filepath.Join(b.Dir, "d"), 0o700) // or it can't be removed
		})
	}
}

// Inputs are no output, however large, and hard links to them neither.
func (s Subject) diskUnderQuota(t *testing.T) {
	b := s.bounded(t, runner.Limits{DiskBytes: 20 * mib})
	for _, name := range []string{"input", "../stored"} {
		if err := os.WriteFile(filepath.Join(b.Dir, name), make([]byte, 30*mib), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(b.Dir, "../stored"), filepath.Join(b.Dir, "linked")); err != nil {
		t.Fatal(err)
	}
	b.Spec.Args = []string{"sh", "-c", "head -c 15000000 /dev/zero > out; sleep 2.5"}
	res, err := b.Run(t.Context(), b.Spec)
	if err != nil || res.ExitCode != 0 || len(res.Notes) > 0 {
		t.Errorf("Run: exit code %d, %v, notes %q", res.ExitCode, err, res.Notes)
	}
}

// A helper that is killed is replaced, in the same group.
func (s Subject) helperKilledInGroup(t *testing.T) {
	b := s.bounded(t, runner.Limits{MemoryBytes: 64 * mib, Processes: 50}, cgroup.Memory, cgroup.Processes)
	s.killHelper(t, b)
	b.wantUnharmed(t)
	b.runEnded(t, runner.ErrOutOfMemory, hog)
	b.wantUnharmed(t)
}
