//go:build linux

package runnertest

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
)

const (
	victimEnv  = "RUNNER_TEST_VICTIM"
	nonRootEnv = "RUNNER_TEST_NON_ROOT"
	markEnv    = "RUNNER_TEST_MARK="
	testUID    = 64990
)

// Bench is a runner with a directory to run in.
type Bench struct {
	Runner
	Dir  string // of the commands
	Seen string // what they see it as
	Spec runner.Spec
}

// NewBench makes a Runner for the test, which as root runs commands as a user of
// their own.
func (s Subject) NewBench(t testing.TB) *Bench {
	t.Helper()
	return s.newBench(t, s.New)
}

// NewBoundedBench is NewBench with a Runner that holds commands to limits.
func (s Subject) NewBoundedBench(t testing.TB, bounds helper.Bounds) *Bench {
	t.Helper()
	return s.newBench(t, func(user helper.User) (Runner, error) { return s.Bounded(user, bounds) })
}

func (s Subject) newBench(t testing.TB, newRunner func(helper.User) (Runner, error)) *Bench {
	t.Helper()
	var user helper.User
	base := t.TempDir()
	if os.Getuid() == 0 {
		user = helper.User{Set: true, UID: testUID, GID: testUID}
		makeTraversable(t, base)
	}
	dir := filepath.Join(base, "root")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if os.Getuid() == 0 {
		if err := os.Chown(dir, testUID, testUID); err != nil {
			t.Fatal(err)
		}
	}
	r, err := newRunner(user)
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) {
		t.Skipf("this machine does not allow it: %v", err) // ENOSPC is how namespaces are forbidden by a sysctl
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	b := &Bench{Runner: r, Dir: dir, Seen: s.Root, Spec: runner.Spec{
		Env: []string{"PATH=/usr/bin:/bin", markEnv + dir}, Root: dir, Dir: dir,
		Stdout: filepath.Join(base, "stdout"), Stderr: filepath.Join(base, "stderr"),
	}}
	if b.Seen == "" {
		b.Seen = dir
	}
	return b
}

// makeTraversable opens the directories of a test, which are 0700 on the way, to
// another user.
func makeTraversable(t testing.TB, dir string) {
	t.Helper()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// Do runs a command that is to be started, whatever it returns.
func (b *Bench) Do(t testing.TB, args ...string) runner.Result {
	t.Helper()
	b.Spec.Args = args
	res, err := b.Run(t.Context(), b.Spec)
	if err != nil {
		t.Fatalf("Run(%q): %v", args, err)
	}
	return res
}

// StdoutText is what the last command printed.
func (b *Bench) StdoutText(t testing.TB) string { return read(t, b.Spec.Stdout) }

// StderrText is what the last command printed to stderr.
func (b *Bench) StderrText(t testing.TB) string { return read(t, b.Spec.Stderr) }

func read(t testing.TB, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
