//go:build linux

package bare_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
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

func TestRunner_Run_leavesNothing(t *testing.T) {
	for name, script := range survivors() {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			if res := b.run(t, "sh", "-c", script); res.ExitCode != 0 || b.stdout(t) != "ready\n" {
				t.Fatalf("exit code %d, stdout %q, stderr %q", res.ExitCode, b.stdout(t), b.stderr(t))
			}
			wantDead(t, b.dir)
			if res := b.run(t, "true"); res.ExitCode != 0 {
				t.Errorf("the next command has exit code %d", res.ExitCode)
			}
		})
	}
}

// wantDead checks that the processes in the file pids have ended, and that no
// process is in dir.
func wantDead(t *testing.T, dir string) {
	t.Helper()
	pids := strings.Fields(read(t, filepath.Join(dir, "pids")))
	if len(pids) == 0 {
		t.Error("the command wrote no process ids")
	}
	for _, pid := range pids {
		if wd, err := os.Readlink("/proc/" + pid + "/cwd"); err == nil && wd == dir {
			t.Errorf("process %s is alive", pid)
		}
	}
	if left := processesIn(dir); len(left) > 0 {
		t.Errorf("processes %v are alive in %s", left, dir)
	}
}

func processesIn(dir string) (pids []string) {
	all, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, link := range all {
		if wd, err := os.Readlink(link); err == nil && strings.HasPrefix(wd, dir) {
			pids = append(pids, strings.Split(link, "/")[2])
		}
	}
	return pids
}

func TestRunner_Run_cancelKillsTheTree(t *testing.T) {
	errStop := errors.New("stop")
	for name, script := range survivors() {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			b.spec.Args = []string{"sh", "-c", script + "; mkfifo p; exec cat p"}
			var wg sync.WaitGroup
			wg.Go(func() {
				waitFor(t, func() bool { return sizeOf(b.spec.Stdout) > 0 })
				cancel(errStop)
			})
			res, err := b.Run(ctx, b.spec)
			wg.Wait()
			if !errors.Is(err, errStop) {
				t.Errorf("Run: %v, want the cause of the cancellation", err)
			}
			if res.ExitCode != 137 || res.StdoutBytes != 6 || b.stdout(t) != "ready\n" {
				t.Errorf("exit code %d, stdout %q, want 137 and what was printed", res.ExitCode, b.stdout(t))
			}
			wantDead(t, b.dir)
			if res := b.run(t, "true"); res.ExitCode != 0 {
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
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(start) > 20*time.Second {
			t.Error("waited for too long")
			return
		}
	}
}

func TestRunner_Run_cancelledBefore(t *testing.T) {
	b := newBench(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	b.spec.Args = []string{"touch", "x"}
	if _, err := b.Run(ctx, b.spec); !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v, want context.Canceled", err)
	}
	if _, err := os.Stat(filepath.Join(b.dir, "x")); err == nil {
		t.Error("the command ran")
	}
}

// A helper that was killed, by the kernel out of memory say, takes its command
// with it and is replaced.
func TestRunner_Run_helperKilled(t *testing.T) {
	b := newBench(t)
	b.spec.Args = []string{"sh", "-c", "echo $$ > pids; echo ready; exec sleep 1000"}
	var wg sync.WaitGroup
	wg.Go(func() {
		waitFor(t, func() bool { return sizeOf(b.spec.Stdout) > 0 })
		pid := strings.TrimSpace(read(t, filepath.Join(b.dir, "pids")))
		stat := strings.Fields(read(t, "/proc/"+pid+"/stat"))
		if helper := atoi(t, stat[3]); helper > 1 {
			_ = syscall.Kill(helper, syscall.SIGKILL)
		}
	})
	_, err := b.Run(t.Context(), b.spec)
	wg.Wait()
	if err == nil {
		t.Error("Run succeeded without its helper")
	}
	waitFor(t, func() bool { return len(processesIn(b.dir)) == 0 })
	if res := b.run(t, "true"); res.ExitCode != 0 {
		t.Errorf("the next command has exit code %d", res.ExitCode)
	}
}

func atoi(t *testing.T, s string) (n int) {
	t.Helper()
	if _, err := fmt.Sscan(s, &n); err != nil {
		t.Error(err)
	}
	return n
}

// victimMain is a worker that is to be killed: it runs survivors until then.
func victimMain(dir string) {
	var wg sync.WaitGroup
	for name, script := range survivors() {
		sub := filepath.Join(dir, strings.ReplaceAll(name, " ", "_"))
		wg.Go(func() {
			_ = os.Mkdir(sub, 0o755)
			opts := bare.Options{}
			if os.Getuid() == 0 {
				opts.User = bare.User{Set: true, UID: testUID, GID: testUID}
				_ = os.Chown(sub, testUID, testUID)
			}
			r, err := bare.New(opts)
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return
			}
			_, err = r.Run(context.Background(), runner.Spec{
				Args: []string{"sh", "-c", script + "; mkfifo p; exec cat p"}, Env: []string{"PATH=/usr/bin:/bin"}, Root: sub, Dir: sub,
				Stdout: sub + ".stdout", Stderr: sub + ".stderr",
			})
			fmt.Fprintln(os.Stderr, "ended", err)
		})
	}
	wg.Wait()
	os.Exit(3)
}

func TestKillOfTheWorkerLeavesNothing(t *testing.T) {
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
	if n := len(processesIn(dir)); n < len(survivors()) {
		t.Errorf("%d processes before the kill, want at least %d", n, len(survivors()))
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	waitFor(t, func() bool { return len(processesIn(dir)) == 0 })
}
