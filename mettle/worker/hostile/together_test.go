//go:build linux

package hostile_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/mettle/worker/hostile"
)

// Two actions that run at the same time, in two slots.

func TestTogether(t *testing.T) {
	for name, way := range map[string]hostile.Way{"sandbox": hostile.Sandbox, "bare": hostile.Bare} {
		t.Run(name, func(t *testing.T) {
			needsRoot(t)
			if way == hostile.Sandbox {
				allowsSandbox(t)
			}
			m := newMachine(t, way, 2)
			t.Run("attack", m.attackOther)
			t.Run("accomplice", m.accomplice)
		})
	}
}

// attackOther tries all that one action can to the other.
func (m *machine) attackOther(t *testing.T) {
	victim := m.publish(t, &repb.Command{
		Arguments: []string{"sh", "-c", `echo mine > mine; chmod 777 . mine; echo secret > /tmp/$LEFT-private; chmod 600 /tmp/$LEFT-private
			export HOSTILE_VICTIM=1; sleep 1000 & touch up; until [ -e stop ]; do sleep 0.01; done; kill -0 $! && cat mine`},
	})
	m.waitFor(t, "slot*/root/up")
	tried := m.execute(t, &repb.Command{Arguments: []string{"sh", "-c", `
		for s in "$WORK/slot0" "$WORK/slot1"; do
			case $PWD in $s/*) continue;; esac
			cat $s/root/mine && echo "read $s"; echo evil > $s/root/mine && echo "wrote $s"; ls $s && echo "listed $s"; echo evil > $s/stdout && echo "printed"
		done 2>/dev/null
		cat /tmp/$LEFT-private 2>/dev/null && echo "read its file"
		for p in /proc/[0-9]*; do
			pid=${p#/proc/}
			[ $pid = $$ ] || [ $pid = $PPID ] && continue
			tr '\0' '\n' < $p/environ 2>/dev/null | grep -q HOSTILE_VICTIM && echo "read the environment of $pid"
			case "$(tr '\0' ' ' < $p/cmdline 2>/dev/null)" in "sleep 1000 ") kill -9 $pid 2>/dev/null && echo "killed $pid";; esac
		done
		kill -9 -1 2>/dev/null; echo end`}})
	if got := string(tried.Result.GetStdoutRaw()); !strings.HasPrefix("end\n", got) {
		t.Errorf("one action could do to the other: %q", got)
	}
	found, _ := filepath.Glob(filepath.Join(m.env["WORK"], "slot*", "root", "mine"))
	if len(found) != 1 {
		t.Fatalf("the other's file is at %q", found)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(found[0]), "stop"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if resp := m.wait(t, victim); string(resp.Result.GetStdoutRaw()) != "mine\n" {
		t.Errorf("the other action: %v", resp)
	}
}

// accomplice has one action hand the descriptor of its output to another, which
// writes to it when the output is a blob.
func (m *machine) accomplice(t *testing.T) {
	taker := m.publish(t, &repb.Command{Arguments: []string{"./" + hostile.ProgramName, "take"}})
	m.waitFor(t, "slot*/root/listens")
	giver := m.execute(t, &repb.Command{Arguments: []string{"./" + hostile.ProgramName, "give"}, OutputPaths: []string{"out"}})
	if m.way == hostile.Sandbox {
		if giver.Result.GetExitCode() != 1 {
			t.Errorf("in a sandbox, one action reached the other: %v", giver)
		}
		if err := m.queue.Cancel(t.Context(), taker.Operation); err != nil {
			t.Fatal(err)
		}
		m.wait(t, taker)
		return
	}
	if giver.Status.GetCode() != 0 || giver.Result.GetExitCode() != 0 || len(giver.Result.OutputFiles) != 1 {
		t.Fatalf("the giver: %v, stderr %s", giver, giver.Result.GetStderrRaw())
	}
	if resp := m.wait(t, taker); resp.Result.GetExitCode() != 0 {
		t.Fatalf("the taker: %v, stderr %s", resp, resp.Result.GetStderrRaw())
	}
	if got := m.read(t, giver.Result.OutputFiles[0].Digest); strings.Contains(got, "evil") {
		t.Error("the output was changed when it was a blob")
	}
}
