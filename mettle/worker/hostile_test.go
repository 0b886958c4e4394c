//go:build linux

package worker_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
)

// sameUser has commands run as the worker's own user, in one slot: all that a
// command can do to it, the next one meets.
func sameUser(o *worker.Options, _ *mem.Options) { o.Slots, o.UIDBase = 1, -1 }

// Without a user of its own, a command can do anything to its slot. The slot
// must not hang because of it, nor be of no use from then on.
func TestWorker_slotIsAttacked(t *testing.T) {
	for name, script := range map[string]string{
		"stdout is a FIFO":              "echo out; rm ../stdout; mkfifo ../stdout",
		"stdout is a large FIFO":        "head -c 100000 /dev/zero; rm ../stdout; mkfifo ../stdout",
		"stdout is a symlink":           "echo out; rm ../stdout; ln -s /etc/passwd ../stdout",
		"stdout is a directory":         "echo out; rm ../stdout; mkdir -p ../stdout/x",
		"stdout is shorter":             "echo out; rm ../stdout; : > ../stdout",
		"stdout is gone":                "echo out; rm ../stdout",
		"stdout was a silent directory": "rm ../stdout; mkdir -p ../stdout/x",
		"the slot is gone":              "cd /; rm -rf $OLDPWD/..",
		"the slot is closed":            "chmod 0 ..",
		"a file is left":                "touch ../left",
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, sameUser).start(t)
			f.execute(t, request{script: script})
			r := f.run(t, request{script: "echo fine; ls ..", command: &repb.Command{OutputPaths: []string{"x"}}}, 0)
			if got := string(r.StdoutRaw); !strings.HasPrefix(got, "fine\n") || strings.Contains(got, "left") {
				t.Errorf("the next command prints %q", got)
			}
		})
	}
}

// Nor may a command leave something in the directories that wait for the next
// input root.
func TestWorker_shelfIsAttacked(t *testing.T) {
	for name, script := range map[string]string{
		"a file":    "for d in ../shelf/*; do touch $d/evil; done",
		"a mode":    "chmod 777 ../shelf/*",
		"a symlink": "for d in ../shelf/*; do rmdir $d; mkdir -p ../../evil; touch ../../evil/evil; ln -s $(realpath ../../evil) $d; done",
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, sameUser, isBare).start(t) // in a sandbox the shelf is out of reach
			d := f.putMessage(t, &repb.Directory{})
			root := &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "a", Digest: d}, {Name: "b", Digest: d}}}
			f.run(t, request{script: "true", root: root}, 0)
			f.run(t, request{script: script}, 0)
			r := f.run(t, request{script: "find . -follow -printf '%P %m\n' | sort", root: root}, 0)
			if got, want := string(r.StdoutRaw), " 755\na 755\nb 755\n"; got != want {
				t.Errorf("the next command finds %q, want %q", got, want)
			}
		})
	}
}

// The worker may read what a command may not, and must not do so for it.
func TestWorker_outputsOfOthers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	f := newFixture(t, isBare).start(t) // in a sandbox there is no directory of others
	shared := filepath.Join(filepath.Dir(f.dir), "shared")
	if err := os.Mkdir(shared, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(shared, 0o777); err != nil { //nolint:gosec // this is the point
		t.Fatal(err)
	}
	secret := func(name string) {
		if err := os.WriteFile(filepath.Join(shared, name), []byte("secret"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	secret("one")
	secret("two")
	resp := f.execute(t, request{
		script:  fmt.Sprintf("mv %s/one out; mkdir dir; mv %[1]s/two dir", shared),
		command: &repb.Command{OutputPaths: []string{"out"}},
	})
	if len(resp.Result.GetOutputFiles()) != 0 || !strings.Contains(resp.Message, "out") {
		t.Errorf("a file that the command can't read: %v", resp)
	}
	secret("two")
	resp = f.execute(t, request{
		script:  fmt.Sprintf("mkdir dir; mv %s/two dir", shared),
		command: &repb.Command{OutputPaths: []string{"dir"}},
	})
	if resp.Status.GetCode() != int32(codes.FailedPrecondition) || len(resp.Result.GetOutputDirectories()) != 0 {
		t.Errorf("a directory of what the command can't read: %v", resp)
	}
}
