//go:build linux

package runnertest

import (
	"os"
	"syscall"
	"testing"

	"github.com/mettle-build/mettle/mettle/worker/cgroup"
	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// BenchmarkTrue measures a command that does nothing.
func (s Subject) BenchmarkTrue(b *testing.B) {
	r := s.NewBench(b)
	r.Spec.Args = []string{"/bin/true"}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Run(b.Context(), r.Spec); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkBounded is BenchmarkTrue with limits that the command does not meet, held by
// as many control groups as this machine allows.
func (s Subject) BenchmarkBounded(b *testing.B) {
	l := runner.Limits{MemoryBytes: 1 << 30, Processes: 4096, DiskBytes: 1 << 40}
	r := s.bounded(b, l, cgroup.Memory)
	r.Spec.Args = []string{"/bin/true"}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Run(b.Context(), r.Spec); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkNewRoot is BenchmarkTrue with another root than the last for each
// command, as the worker has.
func (s Subject) BenchmarkNewRoot(b *testing.B) {
	r := s.NewBench(b)
	r.Spec.Args = []string{"/bin/true"}
	other := r.Dir + "2"
	if err := os.Mkdir(other, 0o755); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := r.Run(b.Context(), r.Spec); err != nil {
			b.Fatal(err)
		}
		r.Spec.Root, other = other, r.Spec.Root
		r.Spec.Dir = r.Spec.Root
	}
}

// BenchmarkForkExec is what the machine itself takes.
func BenchmarkForkExec(b *testing.B) {
	for b.Loop() {
		pid, err := syscall.ForkExec("/bin/true", []string{"true"}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := syscall.Wait4(pid, nil, 0, nil); err != nil {
			b.Fatal(err)
		}
	}
}
