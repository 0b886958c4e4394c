//go:build linux

package runnertest

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
)

// The files that a command prints to are the next one's too where nothing was
// printed. What the command did to their descriptors is not to be found there.
func (s Subject) leavesDescriptorsAsTheyWere(t *testing.T) {
	if _, err := exec.LookPath("perl"); err != nil {
		t.Skip("this machine has no perl")
	}
	for name, script := range map[string]string{
		"flags and offset": `fcntl(STDOUT, F_SETFL, 0) or die; sysseek(STDOUT, 1000000, 0) or die`,
		"offset":           `sysseek(STDOUT, 1000, 0) or die`,
		"flags of stderr":  `fcntl(STDERR, F_SETFL, O_NONBLOCK) or die; sysseek(STDERR, 5, 0) or die`,
		"lease":            `fcntl(STDOUT, 1024, 1) or exit 0; fcntl(STDOUT, 1025, 0) == 1 or die`, // not every file system has leases
	} {
		t.Run(name, func(t *testing.T) {
			b := s.NewBench(t)
			const state = `printf "%x %d %d ", fcntl($_, F_GETFL, 0), sysseek($_, 0, 1), fcntl($_, 1025, 0) for STDOUT, STDERR`
			b.Do(t, "perl", "-MFcntl", "-e", state)
			want := b.StdoutText(t)
			// Only what has printed nothing leaves its files to the next.
			b.Do(t, "true")
			if res := b.Do(t, "perl", "-MFcntl", "-e", script); res.ExitCode != 0 || res.StdoutBytes+res.StderrBytes > 0 {
				t.Fatalf("%s: exit code %d, printed %q", script, res.ExitCode, b.StderrText(t))
			}
			res := b.Do(t, "perl", "-MFcntl", "-e", state)
			if got := b.StdoutText(t); got != want || res.StdoutBytes != int64(len(want)) {
				t.Errorf("the next command finds %.200q (%d bytes), want %q", got, res.StdoutBytes, want)
			}
		})
	}
}

// A command of the helper's own user may change what the helper's later children
// would inherit.
func (s Subject) leavesTheHelperAsItWas(t *testing.T) {
	for _, tool := range []string{"prlimit", "renice", "taskset", "chrt"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("this machine has no %s", tool)
		}
	}
	s.New = asHelper(s.New)
	for name, script := range map[string]string{
		"length of files": `prlimit --pid $PPID --fsize=0`,
		"open files":      `prlimit --pid $PPID --nofile=4:4`,
		"soft limit":      `prlimit --pid $PPID --stack=1048576:`,
		"priority":        `for t in $(ls /proc/$PPID/task 2>/dev/null || seq 1 20); do [ $t = $$ ] || renice -n 19 -p $t; done >/dev/null 2>&1; true`,
		"processors":      `for t in $(ls /proc/$PPID/task 2>/dev/null || seq 1 20); do [ $t = $$ ] || taskset -p 1 $t; done >/dev/null 2>&1; true`,
		"scheduler":       `for t in $(ls /proc/$PPID/task 2>/dev/null || seq 1 20); do [ $t = $$ ] || chrt --batch -p 0 $t; done >/dev/null 2>&1; true`,
	} {
		t.Run(name, func(t *testing.T) {
			b := s.NewBench(t)
			const state = `cat /proc/self/limits; grep Cpus_allowed: /proc/self/status; nice; chrt -p $$ | sed s/[0-9]*.s//`
			shell := func(script string) (runner.Result, string) {
				res := b.Do(t, "sh", "-c", script)
				return res, fmt.Sprint(res.ExitCode, "\n", b.StdoutText(t), b.StderrText(t))
			}
			_, want := shell(state)
			shell(script)
			if _, got := shell(state); strings.TrimSpace(got) != strings.TrimSpace(want) {
				t.Errorf("the next command finds\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// asHelper has commands run as the user of the helper.
func asHelper(with func(helper.User) (Runner, error)) func(helper.User) (Runner, error) {
	return func(helper.User) (Runner, error) { return with(helper.User{}) }
}
