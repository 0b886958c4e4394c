//go:build linux

package hostile_test

import (
	"maps"
	"os"
	"path/filepath"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/hostile"
)

// Where root lets actions run as root, they can do anything to the machine, and yet
// not what only a flag of chattr does: be in the way of the next one.
func TestBare_asRoot(t *testing.T) {
	needsRoot(t)
	mayFix(t)
	m := newMachine(t, hostile.Bare, 1, func(o *worker.Options) { o.UIDBase = -1 })
	for _, attack := range []string{"immutable", "append-only"} {
		t.Run(attack, func(t *testing.T) {
			resp := m.execute(t, &repb.Command{Arguments: []string{"./" + hostile.ProgramName, attack}})
			if resp.Status.GetCode() != 0 || resp.Result.GetExitCode() != 0 {
				t.Fatalf("%v, stderr %s", resp, resp.Result.GetStderrRaw())
			}
			if got := m.view(t); !maps.Equal(got, m.usual) {
				t.Errorf("the next action sees %v, before %v", got, m.usual)
			}
		})
	}
}

// mayFix skips the test where root may not make a file immutable, or the file system
// has no such files.
func mayFix(t *testing.T) {
	t.Helper()
	base := makeBase(t)
	defer os.RemoveAll(base) //nolint:errcheck // there is a file
	f, err := os.Create(filepath.Join(base, "x"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags|0x10)
	}
	if err != nil {
		t.Skipf("this machine does not allow it: %v", err)
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags); err != nil {
		t.Fatal(err)
	}
}
