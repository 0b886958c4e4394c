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

	"github.com/mettle-build/mettle/metrics/logtest"
)

// TestBazel_buildsRemotely follows a user's first hour: a build, its tests, a
// colleague's build that is all cache hits, and a comparison with a local build.
func TestBazel_buildsRemotely(t *testing.T) {
	s := startDual(t, storeDir(t))
	first := newBazel(t)

	checkOnly(t, first.MustRun("build", append(first.remote(s), "//...")...), "remote")
	remote := first.outputs()

	out := first.MustRun("test", append(first.remote(s), "--test_output=all", "//...")...)
	checkOnly(t, out, "remote")
	for _, want := range []string{"greeter says the right thing", "the data is there"} {
		if !strings.Contains(out, want) {
			t.Errorf("the test's output %q is not shown in\n%s", want, out)
		}
	}

	t.Run("a fresh output base has remote cache hits only", func(t *testing.T) {
		second := newBazel(t)
		checkOnly(t, second.MustRun("build", append(second.remote(s), "//...")...), "remote cache hit")
		if diff := cmp.Diff(remote, second.outputs()); diff != "" {
			t.Errorf("outputs from the cache differ (-built +cached):\n%s", diff)
		}
	})

	t.Run("outputs equal those of a local build", func(t *testing.T) {
		local := newBazel(t)
		local.MustRun("build", append(local.local(), "--spawn_strategy=local", "--genrule_strategy=local", "//...")...)
		want := local.outputs()
		// Bazel 4.2 does not make the empty directories of the Trees that it fetches.
		delete(want, "rules/tree/empty")
		if diff := cmp.Diff(want, remote); diff != "" {
			t.Errorf("outputs differ (-local +remote):\n%s", diff)
		}
	})

	t.Run("a build without the bytes", func(t *testing.T) {
		minimal := newBazel(t)
		args := append(
			minimal.remote(s),
			"--experimental_remote_download_outputs=minimal",
			"--experimental_inmemory_jdeps_files",
			"--experimental_inmemory_dotd_files",
			"//app/...", // Bazel 4.2 can't do without the bytes of symlinks, which are elsewhere
		)
		checkOnly(t, minimal.MustRun("build", args...), "remote cache hit")
		if _, err := os.Stat(filepath.Join(minimal.bin(), "app", "hello")); !os.IsNotExist(err) {
			t.Errorf("stat of an output that was not to be fetched: %v", err)
		}
	})
}

// TestBazel_cachesInElan builds here, with results and outputs in Elan alone.
func TestBazel_cachesInElan(t *testing.T) {
	s := startElan(t, "file://"+t.TempDir())
	flags := func(b *bazel) []string {
		return append(b.local(), "--spawn_strategy=local", "--genrule_strategy=local", "--remote_cache=grpc://"+s.Addr(), "//...")
	}
	first := newBazel(t)
	checkOnly(t, first.MustRun("build", flags(first)...), "local")

	// What was acknowledged is there after kill -9.
	s.Kill()
	s.Start()
	second := newBazel(t)
	checkOnly(t, second.MustRun("build", flags(second)...), "remote cache hit")
}

func TestBazel_failuresAreShown(t *testing.T) {
	s := startDual(t, storeDir(t))
	b := newBazel(t)

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
	s := startDual(t, storeDir(t))
	b := newBazel(t)
	b.Write("broken/BUILD", `genrule(name = "broken", srcs = ["in.txt"], outs = ["out.txt"],
    cmd = "echo marker-of-the-broken-rule; cat $(SRCS); exit 7")`)
	b.Write("broken/in.txt", "the input of the broken rule")

	out, code := b.Run("build", append(b.remote(s), "//broken")...)
	if code != 1 {
		t.Fatalf("bazel build ended with %d, want 1\n%s", code, out)
	}
	named := regexp.MustCompile(`mettle (one [^\n]*)`).FindStringSubmatch(out)
	if named == nil {
		t.Fatalf("no command to look at the action again in\n%s", out)
	}
	args := append(strings.Fields(named[1]), "--dir="+storeDir(t))
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
	dir := storeDir(t)
	s := startDual(t, dir, "--slots=2")
	b := newBazel(t)
	b.writeSlowPackage()

	ctx, cancel := context.WithTimeout(t.Context(), bazelTimeout)
	defer cancel()
	args := append(b.remote(s), "--remote_retries=30", "//slow:all")
	cmd := b.command(ctx, "build", args...)
	log := &logtest.Buffer{}
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
	b.checkSlowOutputs()

	// What was acknowledged before a kill is there after it.
	fresh := newBazel(t)
	fresh.writeSlowPackage()
	checkOnly(t, fresh.MustRun("build", append(fresh.remote(s), "//slow:all")...), "remote cache hit")
	fresh.checkSlowOutputs()
}

// TestDual_drains sends SIGTERM while an action runs: the action ends, the
// process leaves with status 0, and the build goes on with the next process,
// without running the action again.
func TestDual_drains(t *testing.T) {
	s := startDual(t, storeDir(t), "--sandbox=bare") // how often the action runs, it tells outside
	b := newBazel(t)
	marker := filepath.Join(storeDir(t), "running")
	if err := os.Chmod(filepath.Dir(marker), 0o777); err != nil { //nolint:gosec // actions run as another user
		t.Fatal(err)
	}
	b.Write("drain/BUILD", `genrule(name = "drain", outs = ["out.txt"],
    cmd = "echo ran >> `+marker+`; sleep 2; echo drained > $@")`)

	ctx, cancel := context.WithTimeout(t.Context(), bazelTimeout)
	defer cancel()
	cmd := b.command(ctx, "build", append(b.remote(s), "--remote_retries=10", "//drain")...)
	log := &logtest.Buffer{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitForFile(ctx, t, marker)
	if err := s.Terminate(ctx); err != nil {
		t.Errorf("mettle dual ended with %v after SIGTERM", err)
	}
	s.Start()
	if err := cmd.Wait(); err != nil {
		t.Errorf("the build whose action was running at SIGTERM: %v\n%s", err, log)
	}
	if runs, err := os.ReadFile(marker); err != nil || string(runs) != "ran\n" {
		t.Errorf("the action ran %q, %v; want once", runs, err)
	}
}

func (b *bazel) writeSlowPackage() {
	b.t.Helper()
	b.Write("slow/BUILD", `[genrule(
    name = "step%d" % i,
    srcs = [":step%d" % (i - 4)] if i >= 4 else [],
    outs = ["step%d.txt" % i],
    cmd = "sleep 0.3; cat $(SRCS) /dev/null > $@; echo step %d >> $@" % i,
) for i in range(40)]`)
}

func (b *bazel) checkSlowOutputs() {
	b.t.Helper()
	got, err := os.ReadFile(filepath.Join(b.bin(), "slow", "step39.txt"))
	if err != nil {
		b.t.Fatal(err)
	}
	want := "step 3\nstep 7\nstep 11\nstep 15\nstep 19\nstep 23\nstep 27\nstep 31\nstep 35\nstep 39\n"
	if diff := cmp.Diff(want, string(got)); diff != "" {
		b.t.Errorf("step39.txt (-want +got):\n%s", diff)
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
