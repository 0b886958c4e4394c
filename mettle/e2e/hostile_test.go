//go:build linux

package e2e_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker/hostile"
)

// Some of the worst of what actions can do to others, to a whole server as it is
// started by default.
func TestDual_hostile(t *testing.T) {
	dir := storeDir(t)
	s := startDual(t, dir, "--slots=1")
	needsSandbox(t, s)
	c := s.client(t)
	way := hostile.PlainSandbox
	if os.Getuid() == 0 {
		way = hostile.Sandbox
	}
	variables := fmt.Sprintf("export STORE='%s' WORK='%[1]s' WORKER=%d PORT=%s LEFT=hostile OPEN=/usr\n", dir, s.cmd.Process.Pid, strconv.Itoa(s.Port))
	look := func() string {
		return outputOf(t, c, putHostile(t, c.client, &repb.Command{Arguments: []string{"/bin/sh", "-c", "ls -A . /tmp /var/tmp; for p in /proc/[0-9]*; do [ $p = /proc/1 ] || echo process; done"}}))
	}
	// There is no process but the shell, beside the helper.
	const usual = ".:\n\n/tmp:\n\n/var/tmp:\nprocess\n"
	for _, g := range hostile.Groups() {
		for _, attack := range g.Cases {
			if attack.Script == "" || attack.Large || !isWorst(attack.Name) {
				continue
			}
			t.Run(attack.Name, func(t *testing.T) {
				cmd := &repb.Command{Arguments: attack.Arguments(), OutputPaths: attack.Outputs}
				cmd.Arguments[2] = variables + cmd.Arguments[2]
				resp := execute(t, c.conn, "", putHostile(t, c.client, cmd))
				want, code := attack.Want[way], 0
				switch want.Verdict { //nolint:exhaustive // the others end with 0
				case hostile.Refused:
					code = 1
				case hostile.Fails:
					code = int(resp.GetResult().GetExitCode())
				}
				if status := resp.GetStatus().GetCode(); want.Verdict == hostile.Fails && int(status) != want.Code || want.Verdict != hostile.Fails && status != 0 ||
					int(resp.GetResult().GetExitCode()) != code || !strings.Contains(resp.GetMessage()+resp.GetStatus().GetMessage(), want.Says) {
					t.Errorf("%v, want %v", resp, want)
				}
				if got := look(); got != usual {
					t.Errorf("the next action finds %q, want %q", got, usual)
				}
			})
		}
	}
}

func isWorst(name string) bool {
	for _, worst := range []string{
		"reads /etc/shadow", "lists the store", "lists the worker's directory", "reads the worker's environment", "signals the worker",
		"leaves a file in", "leaves a daemon that ignores", "leaves a daemon that holds its output", "leaves a process", "leaves directories that", "leaves its own directory", "removes all of its directory",
		"makes stdout 10 GB", "prints without end", "returns a FIFO", "returns what is behind", "returns a name that", "returns a sparse file",
	} {
		if strings.HasPrefix(name, worst) {
			return true
		}
	}
	return false
}

// putHostile stores an action of the command, without inputs, that is run each time.
func putHostile(t *testing.T, s blob.Store, c *repb.Command) digest.Digest {
	t.Helper()
	c.EnvironmentVariables = []*repb.Command_EnvironmentVariable{{Name: "PATH", Value: "/usr/bin:/bin"}}
	command, err := blob.PutMessage(t.Context(), s, digest.SHA256, c)
	if err != nil {
		t.Fatal(err)
	}
	root, err := blob.PutMessage(t.Context(), s, digest.SHA256, &repb.Directory{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := blob.PutMessage(t.Context(), s, digest.SHA256, &repb.Action{CommandDigest: command.Proto(), InputRootDigest: root.Proto(), DoNotCache: true})
	if err != nil {
		t.Fatal(err)
	}
	return d
}
