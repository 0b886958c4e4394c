//go:build linux

package worker_test

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/worker"
)

// BenchmarkExecute is one action after the other on one slot, without a queue,
// beside what the machine itself takes for a directory and a process.
func BenchmarkExecute(b *testing.B) {
	b.Run("floor", func(b *testing.B) {
		dir := filepath.Join(b.TempDir(), "d")
		for b.Loop() {
			if err := os.Mkdir(dir, 0o755); err != nil { //nolint:gosec // as input roots are
				b.Fatal(err)
			}
			pid, err := syscall.ForkExec("/bin/true", []string{"/bin/true"}, &syscall.ProcAttr{Dir: dir, Files: []uintptr{0, 1, 2}})
			if err != nil {
				b.Fatal(err)
			}
			if _, err := syscall.Wait4(pid, nil, 0, nil); err != nil {
				b.Fatal(err)
			}
			if err := os.Remove(dir); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("trivial", func(b *testing.B) {
		f := newFixture(b)
		f.bench(b, request{command: &repb.Command{Arguments: []string{"/bin/true"}}})
	})
	b.Run("50in5out/floor", func(b *testing.B) {
		dir := b.TempDir()
		for b.Loop() {
			pid, err := syscall.ForkExec("/bin/sh", []string{"/bin/sh", "-c", fiveOutputs}, &syscall.ProcAttr{Dir: dir, Files: []uintptr{0, 1, 2}})
			if err != nil {
				b.Fatal(err)
			}
			if _, err := syscall.Wait4(pid, nil, 0, nil); err != nil {
				b.Fatal(err)
			}
			for i := range 5 {
				if err := os.Remove(fmt.Sprintf("%s/o%d", dir, i+1)); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("50in5out", func(b *testing.B) {
		f := newFixture(b)
		root := &repb.Directory{}
		for i := range 5 {
			sub := &repb.Directory{}
			for j := range 10 {
				sub.Files = append(sub.Files, &repb.FileNode{Name: fmt.Sprint(j), Digest: f.put(b, fmt.Sprint("input ", i, j))})
			}
			root.Directories = append(root.Directories, &repb.DirectoryNode{Name: fmt.Sprint(i), Digest: f.putMessage(b, sub)})
		}
		f.bench(b, request{root: root, script: fiveOutputs, command: &repb.Command{OutputPaths: []string{"o1", "o2", "o3", "o4", "o5"}}})
	})
}

const fiveOutputs = `for i in 1 2 3 4 5; do echo $$ $i > o$i; done`

func (f *fixture) bench(b *testing.B, r request) {
	job := f.makeJob(b, r)
	e, err := worker.NewBenchExecutor(b.Context(), f.opts)
	if err != nil {
		b.Fatal(err)
	}
	defer e.Close()
	// As the API server sends it.
	job.Action = []byte(f.read(b, keyOf(b, job).Action.Proto()))
	action := &repb.Action{}
	if err := proto.Unmarshal(job.Action, action); err != nil {
		b.Fatal(err)
	}
	job.Command = []byte(f.read(b, action.CommandDigest))
	b.ReportAllocs()
	for b.Loop() {
		resp, err := e.Execute(b.Context(), job)
		if err != nil || resp.Status.GetCode() != 0 || resp.Result.GetExitCode() != 0 {
			b.Fatal(resp, err)
		}
	}
}
