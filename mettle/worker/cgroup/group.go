//go:build linux

package cgroup

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// Group is the groups that bound and measure one slot's commands. It is used by
// one goroutine at a time.
type Group struct {
	dirs   []groupDir
	handed handover
	files  []*os.File
}

// handover is what a helper is told of its files.
type handover struct {
	Roles []role
	// MemoryBytes is the limit; with Uncounted no counter tells that it was met, as in
	// version 1.
	MemoryBytes int64
	Uncounted   bool
}

type groupDir struct {
	version int
	path    string
}

// Files of version 1.
const (
	tasksFile   = "tasks"
	limitFile   = "memory.limit_in_bytes"
	swapToo     = "memory.memsw.limit_in_bytes"
	quotaFile   = "cpu.cfs_quota_us"
	periodFile  = "cpu.cfs_period_us"
	pidsMaxFile = "pids.max" // of both
)

// period is how long CPU time is counted for, in microseconds: the kernel's default.
const period = 100_000

// NewGroup makes a group that holds to what of limits there are controllers for.
func (t *Tree) NewGroup(limits runner.Limits) (*Group, error) {
	t.mu.Lock()
	t.count++
	name := "commands" + strconv.Itoa(t.count)
	t.mu.Unlock()
	g := &Group{}
	for _, b := range t.bases {
		dir := filepath.Join(b.dir, name)
		if err := t.o.mkdir(dir); err != nil {
			return nil, errors.Join(fmt.Errorf("control group: %w", err), g.Close())
		}
		g.dirs = append(g.dirs, groupDir{b.version, dir})
		if slices.Contains(b.controllers, Memory) {
			g.handed.MemoryBytes, g.handed.Uncounted = limits.MemoryBytes, b.version == 1
		}
		err := b.limit(dir, limits)
		if err == nil {
			err = g.open(b, dir)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("control group: %w", err), g.Close())
		}
	}
	return g, nil
}

// limit writes the limits of the group at dir.
func (b *base) limit(dir string, l runner.Limits) error {
	has := func(c Controller) bool { return slices.Contains(b.controllers, c) }
	set := func(file string, n int64) error { return write(filepath.Join(dir, file), strconv.FormatInt(n, 10)) }
	var all error
	if l.MemoryBytes > 0 && has(Memory) {
		if b.version == 2 {
			all = errors.Join(all, set("memory.max", l.MemoryBytes))
			// Not out of memory but slow for ever would be worse. Where there is no
			// swap, there is no such file. One process less is no command.
			_ = set("memory.swap.max", 0)
			_ = set("memory.oom.group", 1)
		} else {
			all = errors.Join(all, set(limitFile, l.MemoryBytes))
			_ = set(swapToo, l.MemoryBytes) // likewise
		}
	}
	if l.CPUs > 0 && has(CPU) {
		quota := max(int64(l.CPUs*period), 1000) // less the kernel refuses
		if b.version == 2 {
			all = errors.Join(all, write(filepath.Join(dir, "cpu.max"), fmt.Sprint(quota, " ", period)))
		} else {
			all = errors.Join(all, set(periodFile, period), set(quotaFile, quota))
		}
	}
	if l.Processes > 0 && has(Processes) {
		n := int64(l.Processes)
		if b.version == 1 {
			n++ // the helper's thread
		}
		all = errors.Join(all, set(pidsMaxFile, n))
	}
	return all
}

// open opens the files of the group at dir that the helper needs.
func (g *Group) open(b base, dir string) error {
	type file struct {
		role  role
		name  string
		flags int
		must  bool
	}
	var files []file
	if b.version == 2 {
		files = []file{
			{roleInto, ".", unix.O_PATH | unix.O_DIRECTORY, true},
			{roleKill, killFile, unix.O_WRONLY, false},
			{roleCPU, "cpu.stat", unix.O_RDONLY, false},
		}
	} else {
		files = []file{{roleJoin, tasksFile, unix.O_WRONLY, true}}
	}
	for _, c := range b.controllers {
		switch {
		case c == Memory && b.version == 2:
			files = append(files,
				file{roleUsage, "memory.current", unix.O_RDONLY, true}, file{rolePeak, "memory.peak", unix.O_RDWR, false},
				file{roleEvents, "memory.events", unix.O_RDONLY, true})
		case c == Memory:
			files = append(files,
				file{roleUsage, "memory.usage_in_bytes", unix.O_RDONLY, true}, file{rolePeak, "memory.max_usage_in_bytes", unix.O_RDWR, true},
				file{roleEvents, "memory.oom_control", unix.O_RDONLY, true})
		case c == Processes:
			files = append(files, file{roleForks, "pids.events", unix.O_RDONLY, false})
		case c == accounting:
			files = append(files, file{roleUser, "cpuacct.usage_user", unix.O_RDONLY, false}, file{roleSystem, "cpuacct.usage_sys", unix.O_RDONLY, false})
		}
	}
	for _, f := range files {
		path := filepath.Join(dir, f.name)
		fd, err := unix.Open(path, f.flags|unix.O_CLOEXEC, 0)
		if f.role == rolePeak {
			if err == nil && resets(fd) != nil {
				unix.Close(fd) //nolint:errcheck // nothing was written
				err = unix.EACCES
			}
			if err != nil {
				// Before Linux 6.12 this one can't be reset in version 2.
				fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
				f.role = roleAllTimePeak
			}
		}
		if err != nil && !f.must {
			continue // an older kernel
		}
		if err != nil {
			return &os.PathError{Op: "open", Path: path, Err: err}
		}
		g.handed.Roles = append(g.handed.Roles, f.role)
		g.files = append(g.files, os.NewFile(uintptr(fd), path))
	}
	return nil
}

// resets resets a peak, if that can be done; root may open a file for that which it
// can't write to.
func resets(fd int) error {
	_, err := unix.Pwrite(fd, []byte("0"), 0)
	return err
}

// Handover is what a helper needs to be given: a text for Take, and the files, which
// stay the Group's. A nil Group has none.
func (g *Group) Handover() (text string, files []*os.File) {
	if g == nil || len(g.files) == 0 {
		return "", nil
	}
	data, err := json.Marshal(g.handed)
	if err != nil {
		return "", nil // there is no such text
	}
	return string(data), g.files
}

// Unified is the group's directory in version 2, "" where it has none.
func (g *Group) Unified() string {
	if g == nil {
		return ""
	}
	for _, d := range g.dirs {
		if d.version == 2 {
			return d.path
		}
	}
	return ""
}

// Kill kills all processes in the group: those that a helper left that was killed.
func (g *Group) Kill() {
	if g == nil {
		return
	}
	for _, d := range g.dirs {
		killGroup(d.path)
	}
}

// Close removes the group, of which the last process has ended.
func (g *Group) Close() error {
	if g == nil {
		return nil
	}
	var all error
	for _, f := range g.files {
		all = errors.Join(all, f.Close())
	}
	for _, d := range g.dirs {
		all = errors.Join(all, removeGroup(d.path, removeTimeout))
	}
	g.files, g.handed, g.dirs = nil, handover{}, nil
	return all
}

// killGroup kills what is in the group at dir.
func killGroup(dir string) {
	if write(filepath.Join(dir, killFile), "1") == nil {
		return
	}
	// Version 1, or a kernel before 5.14: what forks faster than it can be listed
	// may need another look.
	for range 20 {
		text, err := os.ReadFile(filepath.Join(dir, procsFile))
		pids := strings.Fields(string(text))
		if err != nil || len(pids) == 0 {
			return
		}
		for _, s := range pids {
			// 0 is a process of another PID namespace.
			if pid, err := strconv.Atoi(s); err == nil && pid > 1 && pid != os.Getpid() {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
	}
}
