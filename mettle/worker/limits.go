//go:build linux

package worker

import (
	"cmp"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/cgroup"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
)

// defaultProcesses bounds an action's processes and threads where Options do not. A
// fork bomb is the commonest accident, and takes the machine with it; this is what
// containers and services usually may have, and more than a build's tools have been
// seen to use.
const defaultProcesses = 4096

// Least limits: with less, the preflight itself would fail, which is this program.
const (
	minMemory    = 32 << 20
	minProcesses = 16
)

// howToPermit is for the operator who asked for a limit that can't be held.
const howToPermit = "a service of systemd needs Delegate=yes, a command in a terminal `systemd-run --user --scope -p Delegate=yes`, " +
	"a container a /sys/fs/cgroup that it may write to; see mettle/worker/README.md, Limits"

// settleLimits finds out which limits this machine can hold actions to. One that
// Options ask for and that it can't is an error; the default one is dropped, of which
// Notes tells. With an error there is nothing to close.
func (o *Options) settleLimits() error {
	l := &o.Limits
	if l.MemoryBytes < 0 || l.CPUs < 0 || l.DiskBytes < 0 {
		return errors.New("worker: negative limit of an action")
	}
	if l.MemoryBytes > 0 && l.MemoryBytes < minMemory || l.Processes > 0 && l.Processes < minProcesses {
		return fmt.Errorf("worker: an action with less than %d bytes of memory or %d processes and threads can do nothing", minMemory, minProcesses)
	}
	if o.Runner != nil {
		return nil // it sees to that itself
	}
	o.asksProcesses = l.Processes > 0
	l.Processes = max(0, cmp.Or(l.Processes, defaultProcesses))
	use := []cgroup.Controller{cgroup.Memory, cgroup.Processes}
	if l.CPUs > 0 {
		use = append(use, cgroup.CPU)
	}
	o.groups = cgroup.Open(cgroup.Options{Controllers: use, Logger: o.Logger})
	for _, c := range []struct {
		controller cgroup.Controller
		asked      bool
		what       string
	}{
		{cgroup.Memory, l.MemoryBytes > 0, "memory"},
		{cgroup.CPU, l.CPUs > 0, "CPU time"},
		{cgroup.Processes, o.asksProcesses && !o.countsUsers(), "processes"},
	} {
		if err := o.groups.Missing(c.controller); err != nil && c.asked {
			return errors.Join(fmt.Errorf("worker: an action's %s can't be limited: %w. To permit it: %s", c.what, err, howToPermit), o.closeLimits())
		}
	}
	if err := o.groups.Missing(cgroup.Processes); err != nil && l.Processes > 0 && !o.countsUsers() {
		l.Processes = 0
		o.limitsNote = fmt.Sprintf("the number of an action's processes is not limited: %v", err)
		o.Logger.Warn("the number of an action's processes is not limited, and a fork bomb would take this machine with it; to permit it: "+howToPermit, "error", err)
	}
	return nil
}

// countsUsers reports whether the kernel can count the processes of a slot by their
// user: where each slot has one, or counts of its own for the same one, which came
// with Linux 5.14.
func (o *Options) countsUsers() bool {
	if os.Geteuid() == 0 {
		return o.UIDBase >= 0 && !o.nobody
	}
	return o.sandboxed && kernelIsAtLeast(5, 14)
}

func kernelIsAtLeast(major, minor int) bool {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return false
	}
	var a, b int
	if n, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); n != 2 || err != nil {
		return false
	}
	return a > major || a == major && b >= minor
}

// bounds are those of a new runner, which closes them.
func (o *Options) bounds(user helper.User) (helper.Bounds, error) {
	b := helper.Bounds{Limits: o.Limits}
	if o.groups == nil {
		return b, nil
	}
	err := o.groups.Missing(cgroup.Processes)
	b.CountUser = err != nil && (user.Set || o.sandboxed && os.Geteuid() != 0)
	if err != nil && !b.CountUser && o.asksProcesses {
		return b, fmt.Errorf("an action's processes can't be limited: actions run as root, and %w", err)
	}
	b.Group, err = o.groups.NewGroup(o.Limits)
	return b, err
}

// closeLimits removes what settleLimits made. The runners have been closed.
func (o *Options) closeLimits() error {
	if o.groups == nil {
		return nil
	}
	return o.groups.Close()
}
