//go:build linux

package runnertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
)

// survivors are commands that try to outlive themselves. Each writes its
// processes' ids to the file pids, and prints "ready" when all are up.
func survivors() map[string]string {
	return map[string]string{
		"background":      `sleep 1000 & echo $! >> pids; echo ready`,
		"double fork":     `(sleep 1000 & echo $! >> pids); echo ready`,
		"setsid":          `setsid sh -c 'echo $$ >> pids; touch up; exec sleep 1000' & until [ -e up ]; do sleep 0.01; done; echo ready`,
		"daemon":          `(setsid sh -c '(sh -c "echo \$\$ >> pids; touch up; exec sleep 1000" &)' &); until [ -e up ]; do sleep 0.01; done; echo ready`,
		"ignores SIGTERM": `trap '' TERM HUP INT; sh -c 'echo $$ >> pids; while :; do sleep 0.01; done' & until [ -s pids ]; do sleep 0.01; done; echo ready`,
		"stopped":         `sleep 1000 & echo $! >> pids; kill -STOP $!; echo ready`,
		"respawner":       `cat > r.sh <<'E'` + "\n" + `trap '' TERM; while :; do sh -c 'echo $$ >> pids; exec sleep 1000'; done` + "\nE\n" + `setsid sh r.sh & until [ -s pids ]; do sleep 0.01; done; echo ready`,
		"comet":           `printf '#!/bin/sh\n[ -e stop ] || ./c.sh &\n' > c.sh; chmod +x c.sh; ./c.sh; echo $$ > pids; echo ready`,
		"many":            `for i in 1 2 3 4 5 6 7 8 9 10; do (setsid sh -c 'for j in 1 2 3 4 5; do sleep 1000 & echo $! >> pids; done; wait' &) ; done; until [ "$(wc -l < pids)" = 50 ]; do sleep 0.01; done 2>/dev/null; echo ready`,
	}
}

func (s Subject) leavesNothing(t *testing.T) {
	for name, script := range survivors() {
		t.Run(name, func(t *testing.T) {
			b := s.NewBench(t)
			if res := b.Do(t, "sh", "-c", script); res.ExitCode != 0 || b.StdoutText(t) != "ready\n" {
				t.Fatalf("exit code %d, stdout %q, stderr %q", res.ExitCode, b.StdoutText(t), b.StderrText(t))
			}
			b.WantDead(t)
			if res := b.Do(t, "true"); res.ExitCode != 0 {
				t.Errorf("the next command has exit code %d", res.ExitCode)
			}
		})
	}
}

// WantDead checks that a command wrote the ids of processes, and that no process
// of it is left.
func (b *Bench) WantDead(t testing.TB) {
	t.Helper()
	if len(strings.Fields(read(t, filepath.Join(b.Dir, "pids")))) == 0 {
		t.Error("the command wrote no process ids")
	}
	if left := Marked(b.Dir); len(left) > 0 {
		t.Errorf("processes %v are alive", left)
	}
}

// Marked lists the processes, by the numbers that this process sees, of commands
// whose root is dir or in it.
func Marked(dir string) (pids []string) {
	all, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, file := range all {
		if env, err := os.ReadFile(file); err == nil && strings.Contains("\x00"+string(env), "\x00"+markEnv+dir) {
			pids = append(pids, strings.Split(file, "/")[2])
		}
	}
	return pids
}

// helperOf is the process that started those marked: the parent that is not.
func helperOf(t testing.TB, dir string) int {
	t.Helper()
	pids := Marked(dir)
	for _, pid := range pids {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil {
			continue
		}
		parent := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))[1]
		if !slices.Contains(pids, parent) {
			return atoi(t, parent)
		}
	}
	t.Errorf("processes %v have no helper", pids)
	return 0
}

func (s Subject) cancelKillsTheTree(t *testing.T) {
	errStop := errors.New("stop")
	for name, script := range survivors() {
		t.Run(name, func(t *testing.T) {
			b := s.NewBench(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			b.Spec.Args = []string{"sh", "-c", script + "; mkfifo p; exec cat p"}
			var wg sync.WaitGroup
			wg.Go(func() {
				waitFor(t, func() bool { return sizeOf(b.Spec.Stdout) > 0 })
				cancel(errStop)
			})
			res, err := b.Run(ctx, b.Spec)
			wg.Wait()
			if !errors.Is(err, errStop) {
				t.Errorf("Run: %v, want the cause of the cancellation", err)
			}
			if res.ExitCode != 137 || res.StdoutBytes != 6 || b.StdoutText(t) != "ready\n" {
				t.Errorf("exit code %d, stdout %q, want 137 and what was printed", res.ExitCode, b.StdoutText(t))
			}
			b.WantDead(t)
			if res := b.Do(t, "true"); res.ExitCode != 0 {
				t.Errorf("the next command has exit code %d", res.ExitCode)
			}
		})
	}
}

func sizeOf(file string) int64 {
	if st, err := os.Stat(file); err == nil {
		return st.Size()
	}
	return 0
}

// waitFor waits for something that only another process can tell by its effect.
func waitFor(t testing.TB, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(start) > 20*time.Second {
			t.Error("waited for too long")
			return
		}
	}
}

func (s Subject) cancelledBefore(t *testing.T) {
	b := s.NewBench(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	b.Spec.Args = []string{"touch", "x"}
	if _, err := b.Run(ctx, b.Spec); !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v, want context.Canceled", err)
	}
	if _, err := os.Stat(filepath.Join(b.Dir, "x")); err == nil {
		t.Error("the command ran")
	}
}

// A helper that was killed, by the kernel out of memory say, takes its command
// with it and is replaced.
func (s Subject) helperKilled(t *testing.T) {
	s.killHelper(t, s.NewBench(t))
}

func (s Subject) killHelper(t *testing.T, b *Bench) {
	b.Spec.Args = []string{"sh", "-c", "echo $$ > pids; echo ready; exec sleep 1000"}
	var wg sync.WaitGroup
	wg.Go(func() {
		waitFor(t, func() bool { return sizeOf(b.Spec.Stdout) > 0 })
		if helper := helperOf(t, b.Dir); helper > 1 {
			_ = syscall.Kill(helper, syscall.SIGKILL)
		}
	})
	_, err := b.Run(t.Context(), b.Spec)
	wg.Wait()
	if err == nil {
		t.Error("Run succeeded without its helper")
	}
	waitFor(t, func() bool { return len(Marked(b.Dir)) == 0 })
	if res := b.Do(t, "true"); res.ExitCode != 0 {
		t.Errorf("the next command has exit code %d", res.ExitCode)
	}
}

func atoi(t testing.TB, s string) (n int) {
	t.Helper()
	if _, err := fmt.Sscan(s, &n); err != nil {
		t.Error(err)
	}
	return n
}

// victimMain is a worker that is to be killed: it runs survivors until then.
func (s Subject) victimMain(dir string) {
	var wg sync.WaitGroup
	for name, script := range survivors() {
		sub := filepath.Join(dir, strings.ReplaceAll(name, " ", "_"))
		wg.Go(func() {
			_ = os.Mkdir(sub, 0o755)
			var user helper.User
			if os.Getuid() == 0 {
				user = helper.User{Set: true, UID: testUID, GID: testUID}
				_ = os.Chown(sub, testUID, testUID)
			}
			r, err := s.New(user)
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return
			}
			_, err = r.Run(context.Background(), runner.Spec{
				Args: []string{"sh", "-c", script + "; mkfifo p; exec cat p"}, Env: []string{"PATH=/usr/bin:/bin", markEnv + sub}, Root: sub, Dir: sub,
				Stdout: sub + ".stdout", Stderr: sub + ".stderr",
			})
			fmt.Fprintln(os.Stderr, "ended", err)
		})
	}
	wg.Wait()
	os.Exit(3) //nolint:revive // it is a main
}

func (s Subject) killOfTheWorkerLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	if os.Getuid() == 0 {
		makeTraversable(t, dir)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), victimEnv+"="+dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		for name := range survivors() {
			if sizeOf(filepath.Join(dir, strings.ReplaceAll(name, " ", "_")+".stdout")) == 0 {
				return false
			}
		}
		return true
	})
	if n := len(Marked(dir)); n < len(survivors()) {
		t.Errorf("%d processes before the kill, want at least %d", n, len(survivors()))
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	waitFor(t, func() bool { return len(Marked(dir)) == 0 })
}
