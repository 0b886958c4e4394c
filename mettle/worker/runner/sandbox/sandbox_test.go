//go:build linux

package sandbox_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
	"github.com/mettle-build/mettle/mettle/worker/runner/runnertest"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

func TestMain(m *testing.M) {
	if sandbox.IsHelper() {
		os.Exit(sandbox.HelperMain())
	}
	runnertest.Main(subject())
	goleak.VerifyTestMain(m)
}

func subject() runnertest.Subject {
	return runnertest.Subject{
		Root: sandbox.DefaultRoot,
		New:  func(user helper.User) (runnertest.Runner, error) { return sandbox.New(sandbox.Options{User: user}) },
	}
}

func TestRunner(t *testing.T) { runnertest.Run(t, subject()) }

func BenchmarkRunner_Run(b *testing.B) {
	b.Run("true", subject().BenchmarkTrue)
	b.Run("new root", subject().BenchmarkNewRoot)
	b.Run("fork and exec", runnertest.BenchmarkForkExec)
}
