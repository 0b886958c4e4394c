package e2e_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestBazel_buildsRemotely follows a user's first hour: a build, its tests, a
// colleague's build that is all cache hits, and a comparison with a local build.
func TestBazel_buildsRemotely(t *testing.T) {
	s := startDual(t, t.TempDir())
	ws := copyWorkspace(t)
	first := newBazel(t, ws)

	checkOnly(t, first.MustRun("build", append(first.remote(s), "//...")...), "remote")
	remote := outputs(t, filepath.Join(ws, "bazel-bin"))

	out := first.MustRun("test", append(first.remote(s), "--test_output=all", "//...")...)
	checkOnly(t, out, "remote")
	for _, want := range []string{"greeter says the right thing", "the data is there"} {
		if !strings.Contains(out, want) {
			t.Errorf("the test's output %q is not shown in\n%s", want, out)
		}
	}

	t.Run("a fresh output base has remote cache hits only", func(t *testing.T) {
		second := newBazel(t, ws)
		checkOnly(t, second.MustRun("build", append(second.remote(s), "//...")...), "remote cache hit")
		if diff := cmp.Diff(remote, outputs(t, filepath.Join(ws, "bazel-bin"))); diff != "" {
			t.Errorf("outputs from the cache differ (-built +cached):\n%s", diff)
		}
	})

	t.Run("outputs equal those of a local build", func(t *testing.T) {
		local := newBazel(t, ws)
		local.MustRun("build", append(local.local(), "--spawn_strategy=local", "--genrule_strategy=local", "//...")...)
		if diff := cmp.Diff(outputs(t, filepath.Join(ws, "bazel-bin")), remote); diff != "" {
			t.Errorf("outputs differ (-local +remote):\n%s", diff)
		}
	})

	t.Run("a build without the bytes", func(t *testing.T) {
		minimal := newBazel(t, ws)
		args := append(minimal.remote(s), "--experimental_remote_download_outputs=minimal", "//...")
		checkOnly(t, minimal.MustRun("build", args...), "remote cache hit")
	})
}

func TestBazel_failuresAreShown(t *testing.T) {
	s := startDual(t, t.TempDir())
	b := newBazel(t, copyWorkspace(t))

	out, code := b.Run("test", append(b.remote(s), "--test_output=errors", "//scripts:failing_test")...)
	if code != 3 { // "build OK, but some tests failed", in Bazel's words
		t.Errorf("bazel test ended with %d, want 3\n%s", code, out)
	}
	if want := "marker-of-the-failing-test: two and two make five"; !strings.Contains(out, want) {
		t.Errorf("the failing test's log is not shown:\n%s", out)
	}

	out, code = b.Run("test", append(b.remote(s), "--test_output=errors", "--test_timeout=2", "//scripts:slow_test")...)
	if code != 3 {
		t.Errorf("bazel test ended with %d, want 3\n%s", code, out)
	}
	for _, want := range []string{"marker-of-the-slow-test: printed before the timeout", "TIMEOUT"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in the output of a test that timed out:\n%s", want, out)
		}
	}
}

// TestBazel_lookAgain takes the command that a failed build names, and runs it.
func TestBazel_lookAgain(t *testing.T) {
	s := startDual(t, t.TempDir())
	ws := copyWorkspace(t)
	writeFile(t, filepath.Join(ws, "broken", "BUILD"), `genrule(name = "broken", srcs = ["in.txt"], outs = ["out.txt"],
    cmd = "echo marker-of-the-broken-rule; cat $(SRCS); exit 7")`)
	writeFile(t, filepath.Join(ws, "broken", "in.txt"), "the input of the broken rule")
	b := newBazel(t, ws)

	out, code := b.Run("build", append(b.remote(s), "--remote_print_execution_messages=all", "//broken")...)
	if code != 1 {
		t.Fatalf("bazel build ended with %d, want 1\n%s", code, out)
	}
	named := regexp.MustCompile(`mettle (one [^\n]*)`).FindStringSubmatch(out)
	if named == nil {
		t.Fatalf("no command to look at the action again in\n%s", out)
	}
	args := append(strings.Fields(named[1]), "--dir="+t.TempDir())
	again := exec.CommandContext(t.Context(), binary(t, "mettle"), args...)
	printed, err := again.CombinedOutput()
	if again.ProcessState == nil {
		t.Fatalf("%s: %v", again, err)
	}
	if again.ProcessState.ExitCode() != 7 {
		t.Errorf("%s: exit status %d, want the action's own 7", again, again.ProcessState.ExitCode())
	}
	for _, want := range []string{"marker-of-the-broken-rule", "the input of the broken rule"} {
		if !strings.Contains(string(printed), want) {
			t.Errorf("%s: %q is not in what it printed:\n%s", again, want, printed)
		}
	}
}

// TestBazel_serverKilled kills the server several times in the middle of one
// build, which must end right all the same.
func TestBazel_serverKilled(t *testing.T) {
	dir := t.TempDir()
	s := startDual(t, dir, "--slots=2")
	ws := copyWorkspace(t)
	writeSlowWorkspace(t, ws)
	b := newBazel(t, ws)

	ctx, cancel := context.WithTimeout(t.Context(), bazelTimeout)
	defer cancel()
	args := append(b.remote(s), "--remote_retries=30", "//slow:all")
	cmd := b.command(ctx, "build", args...)
	log := &logBuffer{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1) // one value, and the goroutine never waits
	go func() { done <- cmd.Wait() }()

	const kills = 3
	ended := false
	for i := 0; i < kills && !ended; i++ {
		select {
		case err := <-done:
			done <- err
			ended = true
		case <-time.After(1500 * time.Millisecond): // let some actions end and others begin
			s.Kill()
			s.Start()
		}
	}
	if ended {
		t.Log("the build ended before the last kill")
	}
	if err := <-done; err != nil {
		t.Fatalf("the build did not survive kill -9 of the server: %v\n%s", err, log)
	}
	checkSlowOutputs(t, ws)

	// What was acknowledged before a kill is there after it.
	fresh := newBazel(t, ws)
	checkOnly(t, fresh.MustRun("build", append(fresh.remote(s), "//slow:all")...), "remote cache hit")
	checkSlowOutputs(t, ws)
}

// TestDual_drains sends SIGTERM while an action runs: the action ends, its
// client gets the result, and the process leaves with status 0.
func TestDual_drains(t *testing.T) {
	s := startDual(t, t.TempDir())
	ws := copyWorkspace(t)
	marker := filepath.Join(t.TempDir(), "running")
	if err := os.Chmod(filepath.Dir(marker), 0o777); err != nil { //nolint:gosec // actions run as another user
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(ws, "drain", "BUILD"), `genrule(name = "drain", outs = ["out.txt"],
    cmd = "touch `+marker+`; sleep 2; echo drained > $@")`)
	b := newBazel(t, ws)

	ctx, cancel := context.WithTimeout(t.Context(), bazelTimeout)
	defer cancel()
	cmd := b.command(ctx, "build", append(b.remote(s), "--remote_retries=0", "//drain")...)
	log := &logBuffer{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitForFile(ctx, t, marker)
	if err := s.Terminate(ctx); err != nil {
		t.Errorf("mettle dual ended with %v after SIGTERM", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the build whose action was running at SIGTERM: %v\n%s", err, log)
	}
}

func writeSlowWorkspace(t *testing.T, ws string) {
	t.Helper()
	writeFile(t, filepath.Join(ws, "slow", "BUILD"), `[genrule(
    name = "step%d" % i,
    srcs = [":step%d" % (i - 4)] if i >= 4 else [],
    outs = ["step%d.txt" % i],
    cmd = "sleep 0.3; cat $(SRCS) /dev/null > $@; echo step %d >> $@" % i,
) for i in range(40)]`)
}

func checkSlowOutputs(t *testing.T, ws string) {
	t.Helper()
	got, err := os.ReadFile(filepath.Join(ws, "bazel-bin", "slow", "step39.txt"))
	if err != nil {
		t.Fatal(err)
	}
	want := "step 3\nstep 7\nstep 11\nstep 15\nstep 19\nstep 23\nstep 27\nstep 31\nstep 35\nstep 39\n"
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("step39.txt (-want +got):\n%s", diff)
	}
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // a test's workspace
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil { //nolint:gosec // a test's workspace
		t.Fatal(err)
	}
}

func waitForFile(ctx context.Context, t *testing.T, path string) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(path); err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s did not appear: %v", path, ctx.Err())
		case <-tick.C:
		}
	}
}
