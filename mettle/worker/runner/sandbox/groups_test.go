//go:build linux

package sandbox_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/mettle/worker/cgroup"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

// The mount is read-only, but the kernel does not ask for that where a process is
// started in a group.
func TestRunner_leavesNoControlGroup(t *testing.T) {
	if _, err := exec.LookPath("perl"); err != nil {
		t.Skip("this machine has no perl")
	}
	mounts, err := cgroup.Unified()
	if err != nil || len(mounts) == 0 {
		t.Skipf("this machine has no control groups of version 2: %v", err)
	}
	dir := filepath.Join(mounts[0], "sandbox-test-"+filepath.Base(t.TempDir())+strings.ToLower(t.Name()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skipf("no control group can be made: %v", err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	const clone = `sysopen(D, $ARGV[0], 0x210000) or exit 3; my $a = pack("Q11", 0x200000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, fileno(D));
my $p = syscall(435, $a, 88, 0); exit 4 if $p < 0; if ($p == 0) { exec "cat", "/proc/self/cgroup" } waitpid($p, 0)`
	b := asWorker(t, sandbox.Options{Syscalls: sandbox.AllSyscalls})
	res := b.Do(t, "perl", "-e", clone, dir)
	if got := b.StdoutText(t); strings.Contains(got, filepath.Base(dir)) || res.ExitCode == 0 {
		t.Errorf("exit code %d, a process of it is in another group: %s", res.ExitCode, got)
	}
	tell(t, b, "ls "+mounts[0])
}
