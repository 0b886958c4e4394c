//go:build linux

package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Files of version 2.
const (
	procsFile   = "cgroup.procs"
	subtreeFile = "cgroup.subtree_control"
	killFile    = "cgroup.kill"
	typeFile    = "cgroup.type" // not in the first group
)

// open2 makes the group in the hierarchy of version 2, where the worker is in own.
func (t *Tree) open2(own string) {
	if above := delegatedAbove(own); above != "" {
		own = above
	}
	text, err := os.ReadFile(filepath.Join(own, "cgroup.controllers"))
	if err != nil {
		return
	}
	cs := t.lacks(strings.Fields(string(text)))
	if len(cs) == 0 {
		return
	}
	t.sweep(own)
	var b base
	if err = mayUse(own); err == nil {
		b, err = t.newBase(own)
	}
	if err == nil {
		if err = t.vacate(own); err != nil {
			b.remove()
		}
	}
	if err != nil {
		t.found(cs, err)
		return
	}
	b.version = 2
	for _, c := range cs {
		err := enable(own, c)
		if err == nil {
			err = enable(b.dir, c)
		}
		if err == nil {
			b.controllers = append(b.controllers, c)
		} else {
			t.found([]Controller{c}, err)
		}
	}
	if len(b.controllers) > 0 {
		err := t.tryClone(b.dir)
		t.found(b.controllers, err)
		if err == nil {
			t.bases = append(t.bases, b)
			return
		}
	}
	b.remove()
}

// delegatedAbove is the group above own, where own is only for the worker itself, and
// "" otherwise: it is the one that a worker has moved to, or systemd has delegated the
// one above (DelegateSubgroup=).
func delegatedAbove(own string) string {
	above := filepath.Dir(own)
	if filepath.Base(own) == leaf || isDelegated(above) && !isDelegated(own) {
		return above
	}
	return ""
}

// isDelegated reports whether systemd says that dir is for its user to divide.
func isDelegated(dir string) bool {
	var b [8]byte
	for _, name := range []string{"user.delegate", "trusted.delegate"} {
		if n, err := unix.Getxattr(dir, name, b[:]); err == nil && string(b[:n]) == "1" {
			return true
		}
	}
	return false
}

// mayUse returns an error where the group is systemd's own: it would let root
// divide it, and take the controllers away later.
func mayUse(own string) error {
	name := filepath.Base(own)
	if !strings.HasSuffix(name, ".service") && !strings.HasSuffix(name, ".scope") || os.Geteuid() != 0 || isDelegated(own) {
		return nil
	}
	return fmt.Errorf("systemd has not delegated the group %s: set Delegate=yes", name)
}

// vacate sees to it that no process is in own, as the kernel wants it of a group that is
// divided, unless it is the first one of the machine. Where the worker itself is there,
// and nobody else, it moves to a group of its own. (Some controllers could be enabled
// all the same, but then the groups below take no processes.)
func (t *Tree) vacate(own string) error {
	if _, err := os.Stat(filepath.Join(own, typeFile)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	text, err := os.ReadFile(filepath.Join(own, procsFile))
	if err != nil {
		return err
	}
	pids := strings.Fields(string(text))
	if len(pids) == 0 {
		return nil
	}
	self := strconv.Itoa(os.Getpid())
	if others := slices.DeleteFunc(pids, func(pid string) bool { return pid == self }); len(others) > 0 {
		return fmt.Errorf("other processes are in the worker's group %s (%s): start the worker in a group of its own", filepath.Base(own), strings.Join(others[:min(len(others), 3)], ", "))
	}
	dir := filepath.Join(own, leaf)
	if err := t.o.mkdir(dir); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := write(filepath.Join(dir, procsFile), self); err != nil {
		return fmt.Errorf("move the worker: %w", err)
	}
	return nil
}

// enable makes c usable in the groups below dir.
func enable(dir string, c Controller) error {
	if err := write(filepath.Join(dir, subtreeFile), "+"+string(c)); err != nil {
		return fmt.Errorf("enable it: %w", err)
	}
	return nil
}

// tryClone finds out whether a process can be cloned into a group below dir. It runs
// nothing: there is no such program, which is found out after the clone.
func (t *Tree) tryClone(dir string) error {
	if t.o.fake {
		return nil
	}
	dir = filepath.Join(dir, "try")
	if err := t.o.mkdir(dir); err != nil {
		return err
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return errors.Join(err, removeGroup(dir, removeTimeout))
	}
	defer unix.Close(fd) //nolint:errcheck // only a place
	_, err = syscall.ForkExec("/proc/self/no-such-program", []string{"none"}, &syscall.ProcAttr{
		Sys: &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd},
	})
	if errors.Is(err, unix.ENOENT) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("clone into a group: %w", err)
	}
	return errors.Join(err, removeGroup(dir, removeTimeout))
}

// write writes to a file of a group, which exists.
func write(path, text string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd) //nolint:errcheck // the kernel took it, or not
	for {
		_, err := unix.Write(fd, []byte(text))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return &os.PathError{Op: "write " + text + " to", Path: path, Err: err}
		}
		return nil
	}
}
