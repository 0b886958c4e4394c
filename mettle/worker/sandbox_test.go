//go:build linux

package worker_test

import (
	"bytes"
	"errors"
	"flag"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/metrics/logtest"
	"github.com/mettle-build/mettle/mettle/platform"
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

const refusedVar = "WORKER_TEST_REFUSED"

// Where the kernel refuses a sandbox, auto does without, and says so.
func TestWorker_isolation_fallsBackLoudly(t *testing.T) {
	if os.Getenv(refusedVar) == "" {
		isolated(t)
		inUserNamespace(t, refusedVar)
		return
	}
	if err := os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0); err != nil { // of this namespace
		t.Skip(err)
	}
	var log logtest.Buffer
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) {
		o.Isolation, o.Logger = worker.Auto, slog.New(slog.NewTextHandler(&log, nil))
	})
	w, err := worker.New(f.opts)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if notes := w.Notes(); len(notes) != 1 || !strings.Contains(notes[0], "not isolated") || !strings.Contains(notes[0], "no space left on device") {
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

const oneUserVar = "WORKER_TEST_ONE_USER"

// A root that can be no other user, as in many containers, is not the root of a
// sandbox either.
func TestWorker_isolation_rootOfOneUser(t *testing.T) {
	if os.Getenv(oneUserVar) != "" {
		rootOfOneUser(t)
		return
	}
	isolated(t)
	inUserNamespace(t, oneUserVar)
}

// inUserNamespace runs the test once more, with variable set, as the root of a user
// namespace that has no other user.
func inUserNamespace(t *testing.T, variable string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.count=1", "-test.v", "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), variable+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	if bytes.Contains(out, []byte("SKIP")) {
		t.Skipf("%s", out)
	}
	if err != nil || !bytes.Contains(out, []byte("PASS")) {
		t.Errorf("%v\n%s", err, out)
	}
}

func rootOfOneUser(t *testing.T) {
	if r, err := sandbox.New(sandbox.Options{}); err != nil {
		t.Skip(err) // no sandbox in a sandbox
	} else if err := r.Close(); err != nil {
		t.Error(err)
	}
	var log logtest.Buffer
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) {
		o.Isolation, o.Logger = worker.Namespaces, slog.New(slog.NewTextHandler(&log, nil))
	})
	if w, err := worker.New(f.opts); err == nil || !strings.Contains(err.Error(), "CAP_SETUID") {
		t.Fatalf("New that must isolate: %v, %v", w, err)
	}
	f.opts.Isolation = worker.Auto
	f.start(t)
	if got := f.worker.Isolation(); got != worker.Namespaces {
		t.Errorf("isolation %q", got)
	}
	if notes := f.worker.Notes(); len(notes) == 0 || !strings.Contains(notes[0], "not as users of their slots") {
		t.Errorf("notes %q", notes)
	}
	if n := strings.Count(log.String(), "actions run as"); n != 1 {
		t.Errorf("%d warnings: %s", n, log.String())
	}
	in := f.put(t, "good")
	req := request{
		action: &repb.Action{DoNotCache: true}, root: &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: in}}},
		script: "id -u; id -g; grep CapEff /proc/self/status; cat in; chmod 777 in; echo evil > in; touch out /tmp/x && test ! -w /etc", command: &repb.Command{OutputPaths: []string{"out"}},
	}
	for range 2 {
		r := f.run(t, req, 0)
		if got, want := string(r.StdoutRaw), "65534\n65534\nCapEff:\t0000000000000000\ngood"; got != want || len(r.OutputFiles) != 1 {
			t.Errorf("stdout %q, want %q; outputs %v", got, want, r.OutputFiles)
		}
		req.command, req.action = &repb.Command{OutputPaths: []string{"out"}}, &repb.Action{DoNotCache: true}
	}
	if got := f.read(t, in); got != "good" {
		t.Errorf("the store has %q", got)
	}
}

// What of the network an action asks for, it has where the worker gives it.
func TestWorker_network(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	ask := func(value string) request {
		return request{
			action:  &repb.Action{Platform: &repb.Platform{Properties: []*repb.Platform_Property{{Name: "network", Value: value}}}},
			command: &repb.Command{Arguments: []string{"/bin/bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/" + port}},
		}
	}
	offers := func(w *worker.Worker) bool {
		return slices.Contains(w.Properties(), platform.Property{Name: "network", Value: "external"})
	}
	t.Run("allowed", func(t *testing.T) {
		f := newFixture(t, isolated(t), func(o *worker.Options, _ *mem.Options) { o.AllowNetwork = true }).start(t)
		if !offers(f.worker) {
			t.Errorf("properties %v", f.worker.Properties())
		}
		f.run(t, ask("external"), 0)
		f.run(t, ask("none"), 1)
		f.run(t, ask(""), 1)
		f.run(t, ask("external"), 0)
	})
	t.Run("not allowed", func(t *testing.T) {
		f := newFixture(t, isolated(t)).start(t)
		if offers(f.worker) {
			t.Errorf("properties %v", f.worker.Properties())
		}
		resp := f.execute(t, ask("external"))
		if codes.Code(resp.Status.GetCode()) != codes.InvalidArgument || !strings.Contains(resp.Status.GetMessage(), "network=external") {
			t.Errorf("status %v", resp.Status)
		}
	})
	t.Run("bare", func(t *testing.T) {
		f := newFixture(t, isBare).start(t)
		if !offers(f.worker) {
			t.Errorf("properties %v", f.worker.Properties())
		}
		f.run(t, ask("external"), 0)
		f.run(t, ask("none"), 0) // it can't be kept from it
	})
}
