//go:build linux

package bare_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
	"github.com/mettle-build/mettle/mettle/worker/runner/runnertest"
)

func TestMain(m *testing.M) {
	if bare.IsHelper() {
		os.Exit(bare.HelperMain())
	}
	runnertest.Main(subject())
	goleak.VerifyTestMain(m)
}

func subject() runnertest.Subject {
	return runnertest.Subject{
		New: func(user helper.User) (runnertest.Runner, error) { return bare.New(bare.Options{User: user}) },
		Streaming: func(user helper.User, streams *runner.Streams) (runnertest.Runner, error) {
			return bare.New(bare.Options{User: user, Streams: streams})
		},
		Bounded: func(user helper.User, bounds helper.Bounds) (runnertest.Runner, error) {
			return bare.New(bare.Options{User: user, Bounds: bounds})
		},
	}
}

func TestRunner(t *testing.T) { runnertest.Run(t, subject()) }

func TestRunner_limits(t *testing.T) { runnertest.RunLimits(t, subject()) }

func BenchmarkRunner_Run(b *testing.B) {
	b.Run("true", subject().BenchmarkTrue)
	b.Run("with limits", subject().BenchmarkBounded)
	b.Run("new root", subject().BenchmarkNewRoot)
	b.Run("fork and exec", runnertest.BenchmarkForkExec)
}
