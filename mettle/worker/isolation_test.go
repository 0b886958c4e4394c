//go:build linux

package worker_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
)

// hostile actions try to change an input for all others.
func hostile() map[string]string {
	return map[string]string{
		"write":          "echo evil > in",
		"append":         "echo evil >> tool",
		"chmod":          "chmod 777 in; echo evil > in",
		"chmod +x":       "chmod 777 in",
		"rename":         "echo evil > n; mv -f n in",
		"replace":        "rm -f in; echo evil > in",
		"truncate":       "chmod +w in; : > in",
		"write by child": "(setsid sh -c 'sleep 0.05; chmod +w in; echo evil > in' &) ; sleep 0.1",
	}
}

func TestWorker_inputsCantBeChanged(t *testing.T) {
	t.Run("bare", func(t *testing.T) { inputsCantBeChanged(t, isBare) })
	t.Run("namespaces", func(t *testing.T) { inputsCantBeChanged(t, isolated(t)) })
}

func inputsCantBeChanged(t *testing.T, changes ...change) {
	t.Helper()
	f := newFixture(t, changes...).start(t)
	for name, script := range hostile() {
		t.Run(name, func(t *testing.T) {
			// Of its own, since a changed blob is withdrawn.
			text := "good " + name
			req := request{script: script + "; true", action: &repb.Action{DoNotCache: true}, root: &repb.Directory{Files: []*repb.FileNode{
				{Name: "in", Digest: f.put(t, text)},
				{Name: "tool", Digest: f.put(t, text), IsExecutable: true},
			}}}
			resp := f.execute(t, req)
			req.script, req.command = "cat in; cat tool; stat -c %a in tool", nil
			req.action = &repb.Action{}
			f.put(t, text) // as a client does that hears of a missing blob
			r := f.run(t, req, 0)
			if got, want := string(r.StdoutRaw), text+text+"444\n555\n"; got != want {
				t.Errorf("the next action sees %q, want %q", got, want)
			}
			if got := f.read(t, f.put(t, text)); got != text {
				t.Errorf("the store has %q, want %q", got, text)
			}
			if resp.Status.GetCode() != 0 && (os.Getuid() == 0 || !strings.Contains(resp.Status.Message, "read-only")) {
				t.Errorf("the hostile action has status %v", resp.Status)
			}
		})
	}
}

func TestWorker_equalInputsAreApart(t *testing.T) {
	f := newFixture(t).start(t)
	d := f.put(t, "same")
	r := f.run(t, request{
		root: &repb.Directory{Files: []*repb.FileNode{
			{Name: "a", Digest: d},
			{Name: "b", Digest: d},
			{Name: "e1", Digest: digest.Empty(digest.SHA256).Proto()},
			{Name: "e2", Digest: digest.Empty(digest.SHA256).Proto()},
			{Name: "x", Digest: d, IsExecutable: true},
		}},
		script: `stat -c '%i' a b e1 e2 x | sort | uniq | wc -l; mv -f a b; ls a; echo; ls -1 | tr '\n' ' '; test -x x && test ! -x b`,
	}, 0)
	if got, want := string(r.StdoutRaw), "5\n\nb e1 e2 x "; got != want {
		t.Errorf("stdout %q, want %q", got, want)
	}
}

// An output has the mode that the action gave it, whatever the store's file of
// the same bytes has.
func TestWorker_executableTwins(t *testing.T) {
	f := newFixture(t).start(t)
	r := f.run(t, request{
		root:    &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: f.put(t, "twin"), IsExecutable: true}}},
		command: &repb.Command{OutputPaths: []string{"d", "d/run", "plain", "run"}},
		script:  `printf twin > plain; printf twin > run; chmod +x run; mkdir d; cp run d/run; echo other > d/tool; chmod +x d/tool`,
	}, 0)
	got := map[string]bool{}
	for _, o := range r.OutputFiles {
		got[o.Path] = o.IsExecutable
	}
	if len(got) != 3 || got["plain"] || !got["run"] || !got["d/run"] {
		t.Errorf("executable: %v", got)
	}
}

func TestWorker_outputsNeverLeadOutside(t *testing.T) {
	f := newFixture(t).start(t)
	secret := filepath.Join(filepath.Dir(f.dir), "secret")
	if err := os.WriteFile(secret, []byte("host"), 0o644); err != nil { //nolint:gosec // anyone may read it, and it must not be returned
		t.Fatal(err)
	}
	resp := f.execute(t, request{
		command: &repb.Command{OutputPaths: []string{"above/secret", "absolute", "behind/secret", "dangling", "device", "dir", "fifo", "loop/x", "proc/root/etc/passwd", "real"}},
		// The parents of outputs are there before the command is.
		script: `rm -r above behind loop proc; ln -s ` + filepath.Dir(secret) + ` behind; ln -s ` + secret + ` absolute; ln -s ../../.. above; ln -s nowhere dangling
			mkfifo fifo; ln -s /dev/zero device; mkdir -p dir/sub; mkfifo dir/fifo; ln -s ` + secret + ` dir/link; ln -s loop loop; ln -s /proc/self proc; echo real > real`,
	})
	if resp.Status.GetCode() != 0 || resp.Result.GetExitCode() != 0 {
		t.Fatalf("status %v, %s", resp.Status, resp.Result.GetStderrRaw())
	}
	if len(resp.Result.OutputFiles) != 1 || resp.Result.OutputFiles[0].Path != "real" {
		t.Errorf("output files %v, want only the real one", resp.Result.OutputFiles)
	}
	links := map[string]string{}
	for _, s := range resp.Result.OutputSymlinks {
		links[s.Path] = s.Target
	}
	if len(links) != 3 || links["absolute"] != secret || links["dangling"] != "nowhere" || links["device"] != "/dev/zero" {
		t.Errorf("symlinks %v", links)
	}
	for _, want := range []string{"above/secret", "behind/secret", "fifo", "dir/fifo", "loop/x", "proc/root/etc/passwd"} {
		if !strings.Contains(resp.Message, fmt.Sprintf("%q", want)) {
			t.Errorf("message %q does not explain %s", resp.Message, want)
		}
	}
	f.run(t, request{script: "true"}, 0)
}

// What an action can do to its own directory must not stay.
func TestWorker_leavesNoFiles(t *testing.T) {
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.Slots = 1 }).start(t)
	f.run(t, request{script: "mkdir -p a/b/c; touch a/b/c/d; chmod 000 a/b/c a/b a; chmod 500 .; echo out", root: &repb.Directory{
		Files: []*repb.FileNode{{Name: "in", Digest: f.put(t, "in")}},
	}}, 0)
	want := "root\nshelf\nstderr\nstdout\n"
	if os.Getuid() == 0 || allIsolated() { // then it may not look
		want = ""
	}
	r := f.run(t, request{script: "ls -A; [ $PWD = /build ] || ls -A .. || true"}, 0)
	if got := string(r.StdoutRaw); got != want {
		t.Errorf("the next action sees %q, want %q", got, want)
	}
}

func TestWorker_slotsAreApart(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	f := newFixture(t).start(t)
	one := f.publish(t, request{script: "chmod 777 . ; echo mine > mine; touch up; until [ -e stop ]; do sleep 0.01; done; cat mine"})
	f.waitRunning(t)
	r := f.execute(t, request{script: fmt.Sprintf(`
		for s in %s/slot0 %s/slot1; do echo evil > $s/root/mine; ls $s; done 2>/dev/null | grep -v "^$"; id -u; kill -9 -1`, f.dir, f.dir)})
	if out := strings.Fields(string(r.Result.GetStdoutRaw())); len(out) != 1 || r.Result.ExitCode != 0 && r.Result.ExitCode != 137 && !allIsolated() { // where there is nothing to kill
		t.Errorf("stdout %q, exit code %d", out, r.Result.ExitCode)
	}
	for _, s := range []string{"slot0", "slot1"} {
		if _, err := os.Stat(filepath.Join(f.dir, s, "root", "mine")); err == nil {
			if err := os.WriteFile(filepath.Join(f.dir, s, "root", "stop"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if resp := f.wait(t, one); string(resp.Result.GetStdoutRaw()) != "mine\n" {
		t.Errorf("the other slot's action: %v", resp)
	}
}
