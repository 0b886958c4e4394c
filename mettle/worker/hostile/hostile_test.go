//go:build linux

package hostile_test

import (
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/mettle/worker/hostile"
	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

const (
	// plainVariable says that this process was started to be no root.
	plainVariable = "HOSTILE_TEST_PLAIN"
	// largeVariable has the large cases run too.
	largeVariable = "METTLE_TEST_HOSTILE_LARGE"
	plainUID      = 64299
)

func TestMain(m *testing.M) {
	switch {
	case hostile.IsProgram():
		os.Exit(hostile.ProgramMain())
	case bare.IsHelper():
		os.Exit(bare.HelperMain())
	case sandbox.IsHelper():
		os.Exit(sandbox.HelperMain())
	}
	_ = os.Setenv("GORACE", "atexit_sleep_ms=0") // or each helper takes a second to end
	goleak.VerifyTestMain(m)
}

func logger(t *testing.T) *slog.Logger {
	if testing.Verbose() {
		return slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	return slog.New(slog.DiscardHandler)
}

func TestSandbox(t *testing.T) {
	needsRoot(t)
	allowsSandbox(t)
	runAll(t, hostile.Sandbox)
}

func TestBare(t *testing.T) {
	needsRoot(t)
	runAll(t, hostile.Bare)
}

func TestPlainSandbox(t *testing.T) {
	if asPlainUser(t) {
		return
	}
	allowsSandbox(t)
	runAll(t, hostile.PlainSandbox)
}

func TestPlainBare(t *testing.T) {
	if asPlainUser(t) {
		return
	}
	runAll(t, hostile.PlainBare)
}

func needsRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, to give slots users of their own")
	}
}

// allowsSandbox skips the test where this machine lets nobody mount anything, not even
// in namespaces of one's own. It is asked by a program that is not ours.
func allowsSandbox(t *testing.T) {
	t.Helper()
	path, err := exec.LookPath("mount")
	if err != nil {
		return
	}
	cmd := exec.CommandContext(t.Context(), path, "-t", "tmpfs", "none", "/tmp")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("this machine does not allow a sandbox: %v: %s", err, out)
	}
}

// asPlainUser runs the test again as a user who may do nothing, where this one is
// root, and reports whether it has.
func asPlainUser(t *testing.T) bool {
	t.Helper()
	if os.Getuid() != 0 {
		return false
	}
	if os.Getenv(plainVariable) != "" {
		t.Fatal("still root")
	}
	dir := makeBase(t)
	defer os.RemoveAll(dir) //nolint:errcheck // only what a failed test has left
	if err := os.Chown(dir, plainUID, plainUID); err != nil {
		t.Fatal(err)
	}
	// Its own executable may be where only root can go.
	program := filepath.Join(dir, "test")
	data, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, data, 0o755); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	args := []string{"-test.count=1", "-test.run=^" + t.Name() + "$"}
	if testing.Verbose() {
		args = append(args, "-test.v")
	}
	if run := flag.Lookup("test.run").Value.String(); strings.Contains(run, "/") {
		args[1] = "-test.run=" + run
	}
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Env = append(os.Environ(), plainVariable+"=1", "TMPDIR="+dir)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: plainUID, Gid: plainUID}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("as user %d: %v", plainUID, err)
	}
	if err != nil || testing.Verbose() {
		t.Logf("%s", out)
	}
	return true
}

// runAll runs all cases in one way, in one slot, one after the other.
func runAll(t *testing.T, way hostile.Way) {
	t.Helper()
	m := newMachine(t, way, 1)
	for _, g := range hostile.Groups() {
		for _, c := range g.Cases {
			ok := t.Run(c.Name, func(t *testing.T) {
				if c.Large && os.Getenv(largeVariable) == "" {
					t.Skip("takes long: set " + largeVariable)
				}
				if c.Want[way].Verdict == hostile.Untried {
					t.Skip("it would harm the machine of the test")
				}
				m.attack(t, &c)
			})
			if !ok || !m.mend(t, c.Want[way]) {
				m.close()
				m = newMachine(t, way, 1)
			}
		}
	}
}

// attack runs one case, and looks what has become of everything.
func (m *machine) attack(t *testing.T, c *hostile.Case) {
	t.Helper()
	want := c.Want[m.way]
	cmd := &repb.Command{Arguments: c.Arguments(), OutputPaths: c.Outputs}
	if c.Command != nil {
		c.Command(cmd)
	}
	resp := m.execute(t, cmd)
	checkOutcome(t, want, resp)
	if c.Check != nil && !t.Failed() && want.Verdict == hostile.Harmless {
		if err := c.Check(m.way, resp); err != nil {
			t.Error(err)
		}
	}
	ended := time.Now()
	got := m.view(t)
	if c.Large {
		t.Logf("the next action had ended after %v", time.Since(ended))
	}
	for part := range maps.Keys(m.usual) {
		switch changed, stays := got[part] != m.usual[part], slices.Contains(want.Stays, part); {
		case changed && !stays && want.Verdict != hostile.AsUser:
			t.Errorf("the next action sees other %s (-before +after):\n%s", part, cmp.Diff(strings.Split(m.usual[part], "\n"), strings.Split(got[part], "\n")))
		case !changed && stays:
			t.Errorf("the next action sees the same %s: say so", part)
		}
	}
	m.checkHost(t, want)
}

// mend undoes what an attack could do, and reports whether that was all.
func (m *machine) mend(t *testing.T, o hostile.Outcome) bool {
	t.Helper()
	if o.Verdict != hostile.AsUser && o.Verdict != hostile.Possible {
		return true
	}
	m.removeLeft()
	m.writeFiles(t)
	return maps.Equal(m.view(t), m.usual)
}

// checkOutcome compares a response with what it is to be.
func checkOutcome(t *testing.T, want hostile.Outcome, resp *repb.ExecuteResponse) {
	t.Helper()
	code := -1
	switch want.Verdict { //nolint:exhaustive // the others end with 0
	case hostile.Refused:
		code = 1
	case hostile.AsUser:
		code = min(int(resp.Result.GetExitCode()), 1)
	case hostile.Exits:
		code = want.Code
	case hostile.Fails:
	default:
		code = 0
	}
	text := fmt.Sprintf("status %v, exit code %d, message %q, stdout %.200q, stderr %.400q",
		resp.Status, resp.Result.GetExitCode(), resp.Message, resp.Result.GetStdoutRaw(), resp.Result.GetStderrRaw())
	if want.Verdict == hostile.Fails {
		if int(resp.Status.GetCode()) != want.Code {
			t.Errorf("%s, want status %d", text, want.Code)
		}
	} else if resp.Status.GetCode() != 0 || int(resp.Result.GetExitCode()) != code {
		t.Errorf("%s, want exit code %d", text, code)
	}
	if !strings.Contains(resp.Message+resp.Status.GetMessage(), want.Says) {
		t.Errorf("%s, does not say %q", text, want.Says)
	}
}

// checkHost looks at what is not the action's.
func (m *machine) checkHost(t *testing.T, want hostile.Outcome) {
	t.Helper()
	if got := m.read(t, m.put(t, bigInput())) + m.read(t, m.put(t, belowInput())) + m.read(t, m.put(t, toolInput())); got != bigInput()+belowInput()+toolInput() {
		t.Error("the store has other bytes")
	}
	if want.Verdict == hostile.Possible || want.Verdict == hostile.AsUser {
		return
	}
	for name, mode := range files() {
		data, err := os.ReadFile(filepath.Join(m.base, name))
		st, statErr := os.Stat(filepath.Join(m.base, name))
		if err != nil || statErr != nil || string(data) != name || st.Mode() != mode {
			t.Errorf("%s is %q, %v, mode %v", name, data, err, st.Mode())
		}
	}
	if entries, err := os.ReadDir(m.env["OPEN"]); err != nil || len(entries) > 0 {
		t.Errorf("in the directory of everybody are %v, %v", entries, err)
	}
	entries, err := os.ReadDir(m.env["WORK"])
	if err != nil || len(entries) != 2 {
		t.Errorf("in the worker's directory are %v, %v, want the slot and the lock", entries, err)
	}
	if err := m.worker.Ready(); err != nil {
		t.Errorf("Ready: %v", err)
	}
}
