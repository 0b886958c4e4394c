//go:build linux

package helper

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// Probe runs a command that does nothing but make a file in dir, which must
// exist and belong to the Runner's user, and says what went wrong, if anything:
// whether commands can run here at all, as that user and in such a directory.
// What it wrote is removed again.
func (r *Runner) Probe(ctx context.Context, dir string) error {
	stdout, stderr := filepath.Join(filepath.Dir(dir), "probe.stdout"), filepath.Join(filepath.Dir(dir), "probe.stderr")
	defer os.Remove(stdout) //nolint:errcheck // the directory is cleaned at each start
	defer os.Remove(stderr) //nolint:errcheck // likewise
	res, err := r.Run(ctx, runner.Spec{
		Args: []string{selfExe, probeName, "probe"}, Env: helperEnv(), Root: dir, Dir: dir, Stdout: stdout, Stderr: stderr,
	})
	if err != nil {
		return err
	}
	if res.ExitCode != 0 {
		message, _ := os.ReadFile(stderr)
		return fmt.Errorf("exit code %d: %s", res.ExitCode, strings.TrimSpace(string(message)))
	}
	return os.Remove(filepath.Join(dir, "probe"))
}

// probeMain is the command that Probe runs: it makes a file of that name in the
// working directory.
func probeMain(name string) int {
	fd, err := unix.Open(name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o644)
	if err != nil {
		wd, _ := os.Getwd()
		fmt.Fprintf(os.Stderr, "make a file in %s as user %d: %v\n", wd, os.Getuid(), err)
		return 1
	}
	if err := unix.Close(fd); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
