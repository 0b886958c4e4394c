//go:build linux

package sandbox_test

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
	"github.com/mettle-build/mettle/mettle/worker/runner/runnertest"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

func TestMain(m *testing.M) {
	if sandbox.IsHelper() {
		os.Exit(sandbox.HelperMain())
	}
	lingerMain()
	dialMain()
	runnertest.Main(subject())
	goleak.VerifyTestMain(m)
}

func subject() runnertest.Subject {
	return runnertest.Subject{
		Root: sandbox.DefaultRoot,
		New: func(user helper.User) (runnertest.Runner, error) {
			if err := allowed(); err != nil {
				return nil, err
			}
			return sandbox.New(sandbox.Options{User: user})
		},
		Bounded: func(user helper.User, bounds helper.Bounds) (runnertest.Runner, error) {
			if err := allowed(); err != nil {
				return nil, err
			}
			return sandbox.New(sandbox.Options{User: user, Bounds: bounds})
		},
		Streaming: func(user helper.User, streams *runner.Streams) (runnertest.Runner, error) {
			if err := allowed(); err != nil {
				return nil, err
			}
			return sandbox.New(sandbox.Options{User: user, Streams: streams})
		},
	}
}

// allowed returns an error that wraps EPERM where this machine lets nobody mount
// anything, not even in namespaces of one's own. It is asked by a program that is
// not ours, so that no mistake of ours is taken for a refusal.
func allowed() error {
	path, err := exec.LookPath("mount")
	if err != nil {
		return nil //nolint:nilerr // nobody can be asked
	}
	cmd := exec.Command(path, "-t", "tmpfs", "none", "/tmp") //nolint:noctx // at once
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: mount: %w: %s", syscall.EPERM, err, out)
	}
	return nil
}

func TestRunner(t *testing.T) { runnertest.Run(t, subject()) }

func TestRunner_limits(t *testing.T) { runnertest.RunLimits(t, subject()) }

func BenchmarkRunner_Run(b *testing.B) {
	b.Run("true", subject().BenchmarkTrue)
	b.Run("with limits", subject().BenchmarkBounded)
	b.Run("new root", subject().BenchmarkNewRoot)
	all := subject()
	all.New = func(user helper.User) (runnertest.Runner, error) {
		return sandbox.New(sandbox.Options{User: user, Syscalls: sandbox.AllSyscalls})
	}
	b.Run("all system calls", all.BenchmarkTrue)
	b.Run("fork and exec", runnertest.BenchmarkForkExec)
}
