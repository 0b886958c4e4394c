package bench_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// hasNamespaces reports whether this machine lets this user have namespaces.
func hasNamespaces(t *testing.T) bool {
	t.Helper()
	err := exec.CommandContext(t.Context(), "unshare", "--user", "--mount", "--pid", "--fork", "true").Run()
	return err == nil
}

// Actions that are where the bench is, are in no sandbox.
func TestRun_sandboxedInNoSandbox(t *testing.T) {
	f := newFake()
	pid, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		t.Skip("no namespaces to look at: ", err)
	}
	for name, tc := range map[string]struct{ stdout, want string }{
		"same PID namespace": {"user:[1]\nmnt:[2]\n" + pid + "\n", "in the pid namespace that this process is in"},
		"nothing said":       {"", "do not tell their namespaces"},
	} {
		t.Run(name, func(t *testing.T) {
			if !hasNamespaces(t) {
				t.Skip("this machine allows no namespaces")
			}
			f.stdout = tc.stdout
			rep, err := run(t, quick(f.start(t), "sandboxed"))
			if err != nil {
				t.Fatal(err)
			}
			if got := rep.Results[0]; !strings.Contains(got.Skipped, tc.want) || got.Ops != 0 {
				t.Errorf("skipped %q, %d ops, want it skipped with %q", got.Skipped, got.Ops, tc.want)
			}
		})
	}
}

// The overhead is the time on the worker without that of the command.
func TestRun_overhead(t *testing.T) {
	rep, err := run(t, quick(newFake().start(t), "latency"))
	if err != nil {
		t.Fatal(err)
	}
	// By the fake's metadata; a histogram's resolution is a hundredth.
	if got := rep.Results[0].OverheadMS; got == nil || got.P50 < 1480 || got.P50 > 1520 || got.Max < 1480 {
		t.Errorf("overhead %+v, want 1500 ms", got)
	}
}

// Each op of tree10k finds all that its input root has, and of the inputs that
// are said to change, no more have been uploaded.
func TestRun_tree10k(t *testing.T) {
	f := newFake()
	rep, err := run(t, quick(f.start(t), "tree10k"))
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Results) != 3 {
		t.Fatalf("%d results, want 3", len(rep.Results))
	}
	for _, r := range rep.Results {
		checkResult(t, &r)
		// The value counts the time of the calls alone.
		if got, want := r.Value, 10_000/(r.Seconds/float64(r.Ops)); got < 0.9*want || got > 1.1*want {
			t.Errorf("%s: %v files/s, want %v by the time in %d ops", r.Case, got, want, r.Ops)
		}
	}
}

func TestRun_countsFilesAndDescriptors(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a/b", "c"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	o := quick(newFake().start(t), "latency")
	o.ServerDirs = []string{dir}
	rep, err := run(t, o)
	if err != nil {
		t.Fatal(err)
	}
	if got := rep.Results[0].Server; got == nil || got.FilesBefore != 3 || got.FilesAfter != 3 || got.Error != "" {
		t.Errorf("server %+v, want 3 files before and after", got)
	}
	o.ServerDirs = []string{filepath.Join(dir, "none")}
	if rep, err = run(t, o); err != nil {
		t.Fatal(err)
	}
	if got := rep.Results[0].Server; got == nil || got.Error == "" {
		t.Errorf("server %+v, want that there is no such directory", got)
	}
}
