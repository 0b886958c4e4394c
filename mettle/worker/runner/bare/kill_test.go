//go:build linux

package bare_test

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
	"github.com/mettle-build/mettle/mettle/worker/runner/runnertest"
)

// helper finds the helper of the Runner: it is the parent of the shell that asks.
func helperOf(t *testing.T, b *runnertest.Bench) int {
	t.Helper()
	b.Do(t, "sh", "-c", "echo $PPID")
	pid, err := strconv.Atoi(strings.TrimSpace(b.StdoutText(t)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// A helper that is slow to wake reads the command and the word to kill it at
// once, and must heed both.
func TestRunner_Run_killedBeforeTheHelperLooked(t *testing.T) {
	b := subject().NewBench(t)
	pid := helperOf(t, b)
	stop(t, pid)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(100*time.Millisecond, cancel)
	time.AfterFunc(200*time.Millisecond, func() { _ = unix.Kill(pid, unix.SIGCONT) })
	start := time.Now()
	b.Spec.Args = []string{"sleep", "20"}
	if _, err := b.Run(ctx, b.Spec); !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v, want %v", err, context.Canceled)
	}
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("the command was killed after %v, want at once", d)
	}
}

// stop stops a process, and returns when it has.
func stop(t *testing.T, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); time.Since(start) < 20*time.Second; time.Sleep(time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err == nil && strings.Contains(string(stat), ") T ") {
			return
		}
	}
	t.Fatal("it does not stop")
}

// A command that is the helper's own user can stop it.
func TestRunner_Run_stoppedHelper(t *testing.T) {
	b := subject().NewBench(t)
	r, err := bare.New(bare.Options{KillTimeout: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	b.Spec.Args = []string{"sh", "-c", "kill -STOP $PPID"}
	ended := make(chan error, 1)
	go func() {
		_, err := r.Run(ctx, b.Spec)
		ended <- err
	}()
	select {
	case err := <-ended:
		if err == nil || errors.Is(err, runner.ErrOutputTooLarge) {
			t.Errorf("Run: %v, want an error about the helper", err)
		}
	case <-time.After(15 * time.Second):
		t.Fatal("Run did not end after its context had")
	}
	b.Spec.Args = []string{"true"}
	if _, err := r.Run(t.Context(), b.Spec); err != nil {
		t.Errorf("Run after that: %v", err)
	}
}
