// Package e2e_test drives real clients against real server processes.
package e2e_test

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// bazelTimeout is far beyond what one command of a client takes here.
const bazelTimeout = 10 * time.Minute

// bazelVar names another Bazel than the one on the path, to see whether that version
// builds here. Tests of flags that it does not know fail.
const bazelVar = "METTLE_TEST_BAZEL"

func bazelProgram() string {
	if program := os.Getenv(bazelVar); program != "" {
		return program
	}
	return "bazel"
}

// A bazel is one Bazel client, with a copy of the test workspace and an output
// base of its own.
type bazel struct {
	t          *testing.T
	Workspace  string
	outputBase string
}

// newBazel sets up a client. The Bazel server behind it ends with the test.
func newBazel(t *testing.T) *bazel {
	t.Helper()
	if _, err := exec.LookPath(bazelProgram()); err != nil {
		t.Skip("no bazel here; on Debian: apt-get install bazel-bootstrap")
	}
	b := &bazel{t: t, Workspace: t.TempDir(), outputBase: t.TempDir()}
	if err := os.CopyFS(b.Workspace, os.DirFS(filepath.Join("testdata", "workspace"))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if out, err := b.command(ctx, "shutdown").CombinedOutput(); err != nil {
			t.Errorf("bazel shutdown: %v\n%s", err, out)
		}
		makeWritable(b.outputBase)
	})
	return b
}

// Write adds a file to the workspace.
func (b *bazel) Write(path, content string) {
	b.t.Helper()
	path = filepath.Join(b.Workspace, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // a test's workspace
		b.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil { //nolint:gosec // a test's workspace
		b.t.Fatal(err)
	}
}

// bin is where the outputs are.
func (b *bazel) bin() string { return filepath.Join(b.Workspace, "bazel-bin") }

func (b *bazel) command(ctx context.Context, verb string, args ...string) *exec.Cmd {
	all := append([]string{
		"--noworkspace_rc", "--nohome_rc", // Debian's system rc says where Bazel is
		"--output_base=" + b.outputBase, "--max_idle_secs=60",
		"--host_jvm_args=-Xmx1g", verb,
	}, args...)
	cmd := exec.CommandContext(ctx, bazelProgram(), all...)
	cmd.Dir = b.Workspace
	return cmd
}

// local are the flags of a build on this machine alone, offline.
func (b *bazel) local() []string {
	repos, err := filepath.Abs(filepath.Join("testdata", "repos"))
	if err != nil {
		b.t.Fatal(err)
	}
	flags := []string{"--color=no", "--curses=no", "--show_progress_rate_limit=60", "--jobs=16", "--verbose_failures"}
	for _, name := range []string{"rules_cc", "rules_java", "remote_coverage_tools"} {
		flags = append(flags, "--override_repository="+name+"="+filepath.Join(repos, name))
	}
	return flags
}

// remote are the flags of a build on s and nowhere else.
func (b *bazel) remote(s *server) []string { return b.remoteAt(s.Addr()) }

// remoteAt is remote, on whatever answers at addr.
func (b *bazel) remoteAt(addr string) []string {
	return append(
		b.local(),
		"--remote_executor=grpc://"+addr,
		"--spawn_strategy=remote",
		"--genrule_strategy=remote",
		"--remote_local_fallback=false",
		"--remote_timeout=60",
	)
}

// Run runs a Bazel command and returns what it printed and its exit status.
func (b *bazel) Run(verb string, args ...string) (string, int) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), bazelTimeout)
	defer cancel()
	cmd := b.command(ctx, verb, args...)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		b.t.Fatalf("bazel %s did not end within %v:\n%s", verb, bazelTimeout, out)
	}
	if err != nil && cmd.ProcessState == nil {
		b.t.Fatalf("bazel %s: %v", verb, err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// MustRun is Run for commands that succeed.
func (b *bazel) MustRun(verb string, args ...string) string {
	b.t.Helper()
	out, code := b.Run(verb, args...)
	if code != 0 {
		b.t.Fatalf("bazel %s: exit status %d\n%s", verb, code, out)
	}
	return out
}

var processesLine = regexp.MustCompile(`(?m)^INFO: \d+ process(?:es)?: (.*)\.$`)

// processes reads how many actions Bazel ran by each strategy, from the last of
// its lines like "INFO: 224 processes: 64 internal, 160 remote."
func processes(t *testing.T, out string) map[string]int {
	t.Helper()
	lines := processesLine.FindAllStringSubmatch(out, -1)
	if lines == nil {
		t.Fatalf("no line of process counts in\n%s", out)
	}
	counts := map[string]int{}
	for part := range strings.SplitSeq(lines[len(lines)-1][1], ", ") {
		number, strategy, ok := strings.Cut(part, " ")
		n, err := strconv.Atoi(number)
		if !ok || err != nil {
			t.Fatalf("process count %q in %q", part, lines[len(lines)-1][0])
		}
		counts[strategy] = n
	}
	return counts
}

// checkOnly fails the test where Bazel ran actions by other strategies than
// those given, or none by one of them.
func checkOnly(t *testing.T, out string, strategies ...string) {
	t.Helper()
	counts := processes(t, out)
	for _, s := range strategies {
		if counts[s] == 0 {
			t.Errorf("Bazel ran no action as %q: %v", s, counts)
		}
		delete(counts, s)
	}
	delete(counts, "internal")
	if len(counts) != 0 {
		t.Errorf("Bazel ran actions as %v, want only %v", counts, strategies)
	}
}

// outputs reads all that is in bazel-bin: relative path → mode and content or
// link target. Bazel's own bookkeeping is left out.
func (b *bazel) outputs() map[string]string {
	b.t.Helper()
	dir, err := filepath.EvalSymlinks(b.bin())
	if err != nil {
		b.t.Fatal(err)
	}
	found := map[string]string{}
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if strings.Contains(rel, ".runfiles") {
			return nil
		}
		switch info, err := e.Info(); {
		case err != nil:
			return err
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			target = strings.TrimPrefix(strings.TrimPrefix(target, b.outputBase), b.Workspace)
			found[rel] = "link to " + target
			return err
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			found[rel] = fmt.Sprintf("executable=%t %q", info.Mode()&0o100 != 0, data)
			return err
		case info.IsDir():
			found[rel] = "directory"
		}
		return nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return found
}

// makeWritable lets the test remove the read-only outputs that Bazel leaves.
func makeWritable(dir string) {
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			_ = os.Chmod(path, 0o755) //nolint:gosec // the test's own directory
		}
		return nil
	})
}
