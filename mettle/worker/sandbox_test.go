//go:build linux

package worker_test

import (
	"bytes"
	"errors"
	"flag"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

// isolated runs actions in namespaces, or skips the test where there can be none.
func isolated(t *testing.T) change {
	t.Helper()
	r, err := sandbox.New(sandbox.Options{})
	if err != nil {
		t.Skipf("this machine does not allow a sandbox: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	return func(o *worker.Options, _ *mem.Options) { o.Isolation = worker.Namespaces }
}

// TestWorker_everythingIsolated runs the tests of this package again, with actions in
// a sandbox. Those of a user who may do nothing are among them.
func TestWorker_everythingIsolated(t *testing.T) {
	if os.Getenv(isolationVar) != "" || os.Getenv(nonRootEnv) != "" {
		t.Skip("this is it")
	}
	isolated(t)
	args := []string{"-test.count=1", "-test.skip=^TestWorker_everythingIsolated$|^Fuzz"}
	if run := flag.Lookup("test.run").Value.String(); run != "" && !strings.Contains(run, "everythingIsolated") {
		args = append(args, "-test.run="+run)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), isolationVar+"="+string(worker.Namespaces))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestWorker_isolation_namespaces(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	f := newFixture(t, isolated(t)).start(t)
	if notes := f.worker.Notes(); len(notes) > 0 {
		t.Errorf("notes %q", notes)
	}
	for range 3 { // each with an input root of its own
		r := f.run(t, request{
			action: &repb.Action{DoNotCache: true},
			root:   &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: f.put(t, "input")}}},
			script: "pwd; cat in; ls -A /tmp; echo x > /tmp/x; test ! -e " + f.dir + " && test ! -e " + secret + " && test ! -w /etc",
		}, 0)
		if got, want := string(r.StdoutRaw), "/build\ninput"; got != want {
			t.Errorf("stdout %q, want %q", got, want)
		}
	}
}

// nowhere is a place for input roots that no sandbox can have.
const nowhere = "/usr/no-such-directory/build"

func TestWorker_isolation_fallsBackLoudly(t *testing.T) {
	var log bytes.Buffer
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) {
		o.Isolation, o.SandboxRoot, o.Logger = worker.Auto, nowhere, slog.New(slog.NewTextHandler(&log, nil))
	})
	w, err := worker.New(f.opts)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if notes := w.Notes(); len(notes) != 1 || !strings.Contains(notes[0], "not isolated") || !strings.Contains(notes[0], nowhere) {
		t.Errorf("notes %q", notes)
	}
	if n := strings.Count(log.String(), "level=WARN msg=\"actions are not isolated"); n != 1 {
		t.Errorf("%d warnings: %s", n, log.String())
	}
}

func TestNew_isolationThatCannotBe(t *testing.T) {
	for name, change := range map[string]worker.Options{
		"namespace":          {Isolation: worker.Namespaces, SandboxRoot: nowhere},
		"unknown":            {Isolation: "walls"},
		"auto on no machine": {Isolation: worker.Auto, SandboxRoot: "/proc/build"},
		"beside a Runner":    {Isolation: worker.Auto, Runner: func(int) (runner.Runner, error) { return nil, errors.ErrUnsupported }},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, func(o *worker.Options, _ *mem.Options) {
				o.Isolation, o.SandboxRoot, o.Runner = change.Isolation, change.SandboxRoot, change.Runner
			})
			if w, err := worker.New(f.opts); err == nil {
				t.Errorf("New succeeded: %v", w.Close())
			}
		})
	}
}
