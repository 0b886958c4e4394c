//go:build linux

// Package runnertest is the suite that each way of running commands passes. It is
// called by their tests, whose TestMain begins with runnertest.Main.
package runnertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
)

// Subject is what is tested.
type Subject struct {
	// New makes a Runner whose commands run as user.
	New func(user helper.User) (Runner, error)
	// Bounded makes one that holds commands to limits.
	Bounded func(user helper.User, bounds helper.Bounds) (Runner, error)
	// Streaming makes one whose command has those streams.
	Streaming func(user helper.User, streams *runner.Streams) (Runner, error)
	// Root is where commands see their root; "" is where it is.
	Root string
}

// Runner is what has Probe too.
type Runner interface {
	runner.Runner
	Probe(ctx context.Context, dir string) error
}

// Main is for the start of TestMain: it does not return where this process is
// one that the suite started to kill it.
func Main(s Subject) {
	if dir := os.Getenv(victimEnv); dir != "" {
		s.victimMain(dir)
	}
	_ = os.Setenv("GORACE", "atexit_sleep_ms=0") // or each helper takes a second to end
}

// Run runs the suite.
func Run(t *testing.T, s Subject) {
	for _, c := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"result", s.result},
		{"program", s.program},
		{"environment", s.environment},
		{"descriptorsAndLimits", s.descriptorsAndLimits},
		{"isolatedUser", s.isolatedUser},
		{"outputTooLarge", s.outputTooLarge},
		{"oldOutputIsNotOverwritten", s.oldOutputIsNotOverwritten},
		{"usage", s.usage},
		{"workingDirectoryMissing", s.workingDirectoryMissing},
		{"freshExecutables", s.freshExecutables},
		{"unprivileged", s.unprivileged},
		{"leavesNothing", s.leavesNothing},
		{"cancelKillsTheTree", s.cancelKillsTheTree},
		{"cancelledBefore", s.cancelledBefore},
		{"helperKilled", s.helperKilled},
		{"killOfTheWorkerLeavesNothing", s.killOfTheWorkerLeavesNothing},
		{"reopensOutput", s.reopensOutput},
		{"streams", s.streams},
		{"leavesDescriptorsAsTheyWere", s.leavesDescriptorsAsTheyWere},
		{"leavesTheHelperAsItWas", s.leavesTheHelperAsItWas},
	} {
		t.Run(c.name, c.run)
	}
}

func (s Subject) result(t *testing.T) {
	for _, tc := range []struct {
		name           string
		args           []string
		code           int
		stdout, stderr string
	}{
		{"success", []string{"true"}, 0, "", ""},
		{"failure", []string{"false"}, 1, "", ""},
		{"exit code", []string{"sh", "-c", "echo out; echo err >&2; exit 77"}, 77, "out\n", "err\n"},
		{"any bytes", []string{"printf", "%s", "a\xff\n\x01 \"' ü"}, 0, "a\xff\n\x01 \"' ü", ""},
		{"empty argument", []string{"sh", "-c", `printf '<%s>' "$@"`, "x", "", "y"}, 0, "<><y>", ""},
		{"signal", []string{"sh", "-c", "kill -9 $$"}, 137, "", ""},
		{"abort leaves no core", []string{"sh", "-c", "ulimit -c; kill -6 $$"}, 134, "0\n", ""},
		{"stdin is empty", []string{"cat"}, 0, "", ""},
		{"not in the path", []string{"no-such-program"}, 127, "", "mettle: no-such-program: not found in the PATH \"/usr/bin:/bin\"\n"},
		{"no such file", []string{"./no-such-file"}, 127, "", "mettle: ./no-such-file: no such file or directory\n"},
		{"directory", []string{"/tmp"}, 126, "", "mettle: /tmp: cannot execute: permission denied\n"},
		{"umask", []string{"sh", "-c", "umask"}, 0, "0022\n", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := s.NewBench(t)
			res := b.Do(t, tc.args...)
			if res.ExitCode != tc.code {
				t.Errorf("exit code %d, want %d", res.ExitCode, tc.code)
			}
			if got := b.StdoutText(t); got != tc.stdout || res.StdoutBytes != int64(len(got)) {
				t.Errorf("stdout %q (%d bytes), want %q", got, res.StdoutBytes, tc.stdout)
			}
			if got := b.StderrText(t); got != tc.stderr || res.StderrBytes != int64(len(got)) {
				t.Errorf("stderr %q (%d bytes), want %q", got, res.StderrBytes, tc.stderr)
			}
			if res.Start.IsZero() || res.End.Before(res.Start) {
				t.Errorf("from %v to %v", res.Start, res.End)
			}
		})
	}
}

func (s Subject) program(t *testing.T) {
	b := s.NewBench(t)
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		file := filepath.Join(b.Dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("bin/tool", "#!/bin/sh\necho tool $0\n", 0o755)
	write("bin/plain", "#!/bin/sh\n", 0o644)
	write("bin/bare", "echo no interpreter line\n", 0o755)
	write("bin/lost", "#!/no/such/interpreter\n", 0o755)
	for _, tc := range []struct {
		name, program, path string
		code                int
		output              string // of stdout and stderr
	}{
		{"relative to Dir", "bin/tool", "", 0, "tool bin/tool\n"},
		{"relative PATH", "tool", "PATH=/nowhere:bin", 0, "tool " + b.Seen + "/bin/tool\n"},
		{"first PATH counts", "tool", "PATH=/nowhere", 127, `not found in the PATH "/nowhere"`},
		{"empty PATH entry is Dir", "lost", "PATH=", 127, "not found"},
		{"not executable", "bin/plain", "", 126, "cannot execute: permission denied"},
		{"not executable in the PATH", "plain", "PATH=bin", 126, "but not executable"},
		{"no interpreter line", "bin/bare", "", 126, "neither a program of this machine nor a script"},
		{"interpreter missing", "bin/lost", "", 127, "the interpreter or loader that it names is missing"},
		{"no PATH at all", "true", "", 0, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b.Spec.Env = nil
			if tc.path != "" {
				b.Spec.Env = []string{tc.path, "PATH=/usr/bin:/bin"}
			}
			res := b.Do(t, tc.program)
			if out := b.StdoutText(t) + b.StderrText(t); res.ExitCode != tc.code || !strings.Contains(out, tc.output) || tc.output == "" && out != "" {
				t.Errorf("exit code %d, output %q, want %d and %q", res.ExitCode, out, tc.code, tc.output)
			}
		})
	}
}

func (s Subject) environment(t *testing.T) {
	b := s.NewBench(t)
	t.Setenv("FROM_THE_WORKER", "leaked")
	b.Spec.Env = []string{"A=1", "B=two words", "EMPTY="}
	b.Do(t, "/usr/bin/env")
	if got, want := b.StdoutText(t), "A=1\nB=two words\nEMPTY=\n"; got != want {
		t.Errorf("environment %q, want %q", got, want)
	}
}

func (s Subject) descriptorsAndLimits(t *testing.T) {
	b := s.NewBench(t)
	b.Do(t, "sh", "-c", "ls /proc/self/fd | tr '\\n' ' '; ulimit -Sn")
	// ls has its own descriptor of the directory.
	var original string
	if out, err := exec.CommandContext(t.Context(), "sh", "-c", "ulimit -Sn").Output(); err == nil { // os/exec restores it
		original = string(out)
	}
	if got, want := b.StdoutText(t), "0 1 2 3 "+original; got != want {
		t.Errorf("descriptors and limit %q, want %q", got, want)
	}
}

func (s Subject) isolatedUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	b := s.NewBench(t)
	// An input as the builder of input roots links it.
	input := filepath.Join(b.Dir, "input")
	if err := os.WriteFile(input, []byte("good"), 0o444); err != nil {
		t.Fatal(err)
	}
	b.Do(t, "sh", "-c", "id -u; id -G; echo evil > input; chmod 777 input; rm ../stderr; echo x > ../x; grep -c . /proc/self/status >/dev/null && grep CapEff /proc/self/status")
	if got, want := b.StdoutText(t), fmt.Sprintf("%d\n%d\nCapEff:\t0000000000000000\n", testUID, testUID); got != want {
		t.Errorf("user, groups and capabilities %q, want %q", got, want)
	}
	if st, err := os.Stat(input); err != nil || st.Mode().Perm() != 0o444 || read(t, input) != "good" {
		t.Errorf("input has mode %v and is %q", st.Mode(), read(t, input))
	}
	if n := strings.Count(b.StderrText(t), "denied") + strings.Count(b.StderrText(t), "not permitted") +
		strings.Count(b.StderrText(t), "Read-only") + strings.Count(b.StderrText(t), "No such file"); n != 4 {
		t.Errorf("%d of 4 forbidden things were refused: %s", n, b.StderrText(t))
	}
	if err := b.Probe(t.Context(), b.Dir); err != nil {
		t.Errorf("Probe: %v", err)
	}
	if s.Root != "" {
		return // the way to the root is the helper's
	}
	if err := os.Chmod(filepath.Dir(b.Dir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := b.Probe(t.Context(), b.Dir); err == nil {
		t.Error("Probe passed below a directory that its user may not enter")
	}
}

func (s Subject) outputTooLarge(t *testing.T) {
	for name, args := range map[string][]string{
		"short": {"sh", "-c", "head -c 2000000 /dev/zero"},
		"long":  {"sh", "-c", "head -c 2000000 /dev/zero >&2; exec sleep 1000"},
	} {
		t.Run(name, func(t *testing.T) {
			b := s.NewBench(t)
			b.Spec.MaxOutputBytes = 1 << 20
			b.Spec.Args = args
			if _, err := b.Run(t.Context(), b.Spec); !errors.Is(err, runner.ErrOutputTooLarge) {
				t.Errorf("Run: %v, want ErrOutputTooLarge", err)
			}
			if res := b.Do(t, "sh", "-c", "head -c 1048576 /dev/zero"); res.StdoutBytes != 1<<20 || res.StderrBytes != 0 {
				t.Errorf("then stdout has %d bytes, stderr %d", res.StdoutBytes, res.StderrBytes)
			}
		})
	}
}

// A file that was stdout may be a blob now.
func (s Subject) oldOutputIsNotOverwritten(t *testing.T) {
	b := s.NewBench(t)
	b.Do(t, "echo", "first")
	keep := filepath.Join(filepath.Dir(b.Dir), "keep")
	if err := os.Link(b.Spec.Stdout, keep); err != nil {
		t.Fatal(err)
	}
	b.Do(t, "echo", "second")
	if read(t, keep) != "first\n" || b.StdoutText(t) != "second\n" {
		t.Errorf("the first stdout is %q, the second %q", read(t, keep), b.StdoutText(t))
	}
}

func (s Subject) usage(t *testing.T) {
	b := s.NewBench(t)
	res := b.Do(t, "sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
	if u := res.Usage; u.UserTime <= 0 || u.MaxRSSBytes < 100<<10 || u.MinorFaults <= 0 {
		t.Errorf("usage %+v", u)
	}
}

func (s Subject) workingDirectoryMissing(t *testing.T) {
	b := s.NewBench(t)
	b.Spec.Dir = filepath.Join(b.Dir, "missing")
	b.Spec.Args = []string{"true"}
	if res, err := b.Run(t.Context(), b.Spec); err == nil {
		t.Errorf("Run: %+v, want an error", res)
	}
	b.Spec.Dir = b.Dir
	b.Do(t, "true")
}

// Files that were just written are executed at once by many runners, while others
// are being written: golang/go#22315.
func (s Subject) freshExecutables(t *testing.T) {
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		b := s.NewBench(t)
		wg.Go(func() {
			for i := range 50 {
				file := filepath.Join(b.Dir, fmt.Sprint("program", i))
				if err := os.WriteFile(file, program, 0o755); err != nil {
					t.Error(err)
					return
				}
				b.Spec.Args = []string{filepath.Join(b.Seen, filepath.Base(file))}
				if res, err := b.Run(t.Context(), b.Spec); err != nil || res.ExitCode != 0 {
					said, _ := os.ReadFile(b.Spec.Stderr)
					t.Errorf("Run: exit code %d, %v: %s", res.ExitCode, err, said)
					return
				}
			}
		})
	}
	wg.Wait()
}

// unprivileged runs the other tests as a user who may do nothing.
func (s Subject) unprivileged(t *testing.T) {
	if os.Getuid() != 0 || os.Getenv(nonRootEnv) != "" {
		t.Skip("needs root to become another user")
	}
	dir := t.TempDir()
	makeTraversable(t, dir)
	if err := os.Chown(dir, testUID+1, testUID+1); err != nil {
		t.Fatal(err)
	}
	args := []string{"-test.count=1"}
	if i := slices.IndexFunc(os.Args, func(a string) bool { return strings.HasPrefix(a, "-test.run") }); i > 0 {
		args = append(args, os.Args[i])
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), nonRootEnv+"=1", "TMPDIR="+dir)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: testUID + 1, Gid: testUID + 1}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("as user %d: %v\n%s", testUID+1, err, out)
	}
}

// Programs open /dev/stdout and /dev/stderr as they would any file.
func (s Subject) reopensOutput(t *testing.T) {
	b := s.NewBench(t)
	res := b.Do(t, "sh", "-c", "echo out >>/dev/stdout; echo err >>/dev/stderr; echo more | tee -a /dev/stderr >/dev/null")
	if res.ExitCode != 0 || b.StdoutText(t) != "out\n" || b.StderrText(t) != "err\nmore\n" {
		t.Errorf("exit code %d, stdout %q, stderr %q", res.ExitCode, b.StdoutText(t), b.StderrText(t))
	}
}
