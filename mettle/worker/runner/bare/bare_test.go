//go:build linux

package bare_test

import (
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

	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
)

func TestMain(m *testing.M) {
	if bare.IsHelper() {
		os.Exit(bare.HelperMain())
	}
	if dir := os.Getenv(victimEnv); dir != "" {
		victimMain(dir)
	}
	_ = os.Setenv("GORACE", "atexit_sleep_ms=0") // or each helper takes a second to end
	goleak.VerifyTestMain(m)
}

const (
	victimEnv  = "BARE_TEST_VICTIM"
	nonRootEnv = "BARE_TEST_NON_ROOT"
	testUID    = 64990
)

// bench is a runner with a directory to run in.
type bench struct {
	*bare.Runner
	dir  string // of the commands
	spec runner.Spec
}

func newBench(t testing.TB) *bench {
	t.Helper()
	opts := bare.Options{}
	base := t.TempDir()
	if os.Getuid() == 0 {
		opts.User = bare.User{Set: true, UID: testUID, GID: testUID}
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
	r, err := bare.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return &bench{Runner: r, dir: dir, spec: runner.Spec{
		Env: []string{"PATH=/usr/bin:/bin"}, Root: dir, Dir: dir,
		Stdout: filepath.Join(base, "stdout"), Stderr: filepath.Join(base, "stderr"),
	}}
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

func (b *bench) run(t testing.TB, args ...string) runner.Result {
	t.Helper()
	b.spec.Args = args
	res, err := b.Run(t.Context(), b.spec)
	if err != nil {
		t.Fatalf("Run(%q): %v", args, err)
	}
	return res
}

func (b *bench) stdout(t testing.TB) string { return read(t, b.spec.Stdout) }
func (b *bench) stderr(t testing.TB) string { return read(t, b.spec.Stderr) }

func read(t testing.TB, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestRunner_Run_result(t *testing.T) {
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
			b := newBench(t)
			res := b.run(t, tc.args...)
			if res.ExitCode != tc.code {
				t.Errorf("exit code %d, want %d", res.ExitCode, tc.code)
			}
			if got := b.stdout(t); got != tc.stdout || res.StdoutBytes != int64(len(got)) {
				t.Errorf("stdout %q (%d bytes), want %q", got, res.StdoutBytes, tc.stdout)
			}
			if got := b.stderr(t); got != tc.stderr || res.StderrBytes != int64(len(got)) {
				t.Errorf("stderr %q (%d bytes), want %q", got, res.StderrBytes, tc.stderr)
			}
			if res.Start.IsZero() || res.End.Before(res.Start) {
				t.Errorf("from %v to %v", res.Start, res.End)
			}
		})
	}
}

func TestRunner_Run_program(t *testing.T) {
	b := newBench(t)
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		file := filepath.Join(b.dir, name)
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
		{"relative PATH", "tool", "PATH=/nowhere:bin", 0, "tool " + b.dir + "/bin/tool\n"},
		{"first PATH counts", "tool", "PATH=/nowhere", 127, `not found in the PATH "/nowhere"`},
		{"empty PATH entry is Dir", "lost", "PATH=", 127, "not found"},
		{"not executable", "bin/plain", "", 126, "cannot execute: permission denied"},
		{"not executable in the PATH", "plain", "PATH=bin", 126, "but not executable"},
		{"no interpreter line", "bin/bare", "", 126, "neither a program of this machine nor a script"},
		{"interpreter missing", "bin/lost", "", 127, "the interpreter or loader that it names is missing"},
		{"no PATH at all", "true", "", 0, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b.spec.Env = nil
			if tc.path != "" {
				b.spec.Env = []string{tc.path, "PATH=/usr/bin:/bin"}
			}
			res := b.run(t, tc.program)
			if out := b.stdout(t) + b.stderr(t); res.ExitCode != tc.code || !strings.Contains(out, tc.output) || tc.output == "" && out != "" {
				t.Errorf("exit code %d, output %q, want %d and %q", res.ExitCode, out, tc.code, tc.output)
			}
		})
	}
}

func TestRunner_Run_environment(t *testing.T) {
	b := newBench(t)
	t.Setenv("FROM_THE_WORKER", "leaked")
	b.spec.Env = []string{"A=1", "B=two words", "EMPTY="}
	b.run(t, "/usr/bin/env")
	if got, want := b.stdout(t), "A=1\nB=two words\nEMPTY=\n"; got != want {
		t.Errorf("environment %q, want %q", got, want)
	}
}

func TestRunner_Run_descriptorsAndLimits(t *testing.T) {
	b := newBench(t)
	b.run(t, "sh", "-c", "ls /proc/self/fd | tr '\\n' ' '; ulimit -Sn")
	// ls has its own descriptor of the directory.
	var original string
	if out, err := exec.CommandContext(t.Context(), "sh", "-c", "ulimit -Sn").Output(); err == nil { // os/exec restores it
		original = string(out)
	}
	if got, want := b.stdout(t), "0 1 2 3 "+original; got != want {
		t.Errorf("descriptors and limit %q, want %q", got, want)
	}
}

func TestRunner_Run_isolatedUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	b := newBench(t)
	// An input as the builder of input roots links it.
	input := filepath.Join(b.dir, "input")
	if err := os.WriteFile(input, []byte("good"), 0o444); err != nil {
		t.Fatal(err)
	}
	b.run(t, "sh", "-c", "id -u; id -G; echo evil > input; chmod 777 input; rm ../stderr; echo x > ../x; grep -c . /proc/self/status >/dev/null && grep CapEff /proc/self/status")
	if got, want := b.stdout(t), fmt.Sprintf("%d\n%d\nCapEff:\t0000000000000000\n", testUID, testUID); got != want {
		t.Errorf("user, groups and capabilities %q, want %q", got, want)
	}
	if st, err := os.Stat(input); err != nil || st.Mode().Perm() != 0o444 || read(t, input) != "good" {
		t.Errorf("input has mode %v and is %q", st.Mode(), read(t, input))
	}
	if n := strings.Count(b.stderr(t), "denied") + strings.Count(b.stderr(t), "not permitted"); n != 4 {
		t.Errorf("%d of 4 forbidden things were refused: %s", n, b.stderr(t))
	}
	if err := b.Probe(t.Context(), b.dir); err != nil {
		t.Errorf("Probe: %v", err)
	}
	if err := os.Chmod(filepath.Dir(b.dir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := b.Probe(t.Context(), b.dir); err == nil {
		t.Error("Probe passed below a directory that its user may not enter")
	}
}

func TestRunner_Run_outputTooLarge(t *testing.T) {
	for name, args := range map[string][]string{
		"short": {"sh", "-c", "head -c 2000000 /dev/zero"},
		"long":  {"sh", "-c", "head -c 2000000 /dev/zero >&2; exec sleep 1000"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.spec.MaxOutputBytes = 1 << 20
			b.spec.Args = args
			if _, err := b.Run(t.Context(), b.spec); !errors.Is(err, runner.ErrOutputTooLarge) {
				t.Errorf("Run: %v, want ErrOutputTooLarge", err)
			}
			if res := b.run(t, "sh", "-c", "head -c 1048576 /dev/zero"); res.StdoutBytes != 1<<20 || res.StderrBytes != 0 {
				t.Errorf("then stdout has %d bytes, stderr %d", res.StdoutBytes, res.StderrBytes)
			}
		})
	}
}

// A file that was stdout may be a blob now.
func TestRunner_Run_oldOutputIsNotOverwritten(t *testing.T) {
	b := newBench(t)
	b.run(t, "echo", "first")
	keep := filepath.Join(filepath.Dir(b.dir), "keep")
	if err := os.Link(b.spec.Stdout, keep); err != nil {
		t.Fatal(err)
	}
	b.run(t, "echo", "second")
	if read(t, keep) != "first\n" || b.stdout(t) != "second\n" {
		t.Errorf("the first stdout is %q, the second %q", read(t, keep), b.stdout(t))
	}
}

func TestRunner_Run_usage(t *testing.T) {
	b := newBench(t)
	res := b.run(t, "sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
	if u := res.Usage; u.UserTime <= 0 || u.MaxRSSBytes < 100<<10 || u.MinorFaults <= 0 {
		t.Errorf("usage %+v", u)
	}
}

func TestRunner_Run_workingDirectoryMissing(t *testing.T) {
	b := newBench(t)
	b.spec.Dir = filepath.Join(b.dir, "missing")
	b.spec.Args = []string{"true"}
	if res, err := b.Run(t.Context(), b.spec); err == nil {
		t.Errorf("Run: %+v, want an error", res)
	}
	b.spec.Dir = b.dir
	b.run(t, "true")
}

// Files that were just written are executed at once by many runners, while others
// are being written: golang/go#22315.
func TestRunner_Run_freshExecutables(t *testing.T) {
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		b := newBench(t)
		wg.Go(func() {
			for i := range 50 {
				file := filepath.Join(b.dir, fmt.Sprint("program", i))
				if err := os.WriteFile(file, program, 0o755); err != nil {
					t.Error(err)
					return
				}
				b.spec.Args = []string{file}
				if res, err := b.Run(t.Context(), b.spec); err != nil || res.ExitCode != 0 {
					t.Errorf("Run: exit code %d, %v", res.ExitCode, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestUnprivileged runs the other tests as a user who may do nothing.
func TestUnprivileged(t *testing.T) {
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

func BenchmarkRunner_Run_true(b *testing.B) {
	r := newBench(b)
	r.spec.Args = []string{"/bin/true"}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Run(b.Context(), r.spec); err != nil {
			b.Fatal(err)
		}
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
