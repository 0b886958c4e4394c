//go:build linux

package helper

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// killAll kills the descendants of the helper until there are none, and reports
// whether some are left when the time is over.
//
// The helper is a subreaper: whoever's parent dies becomes its child. So each
// round kills what is seen, and the next finds what was forked meanwhile, until
// wait4 says that there are no children.
func (h *helper) killAll() (left bool) {
	total := h.setting.KillAll() || h.group.Kill()
	if !h.child.ended && !total {
		// The usual case in one system call: the session's first process
		// group.
		_ = unix.Kill(-h.child.pid, unix.SIGKILL)
	}
	deadline := time.Now().Add(h.killTimeout)
	pause := 50 * time.Microsecond
	for round := 0; h.reap(); round++ {
		if time.Now().After(deadline) {
			return true
		}
		if total {
			_ = h.setting.KillAll() || h.group.Kill()
		} else {
			killDescendants(os.Getpid())
			if round > 20 && round%10 == 0 && h.uid > 0 {
				h.killUser()
			}
		}
		if !h.reap() {
			return false
		}
		time.Sleep(pause)
		pause = min(2*pause, 10*time.Millisecond)
	}
	return false
}

// maxDescendants bounds one look at the descendants; the next round sees the
// others.
const maxDescendants = 100_000

// killDescendants kills every descendant of pid that it sees, parents before
// children, so that none can replace a child that it lost.
func killDescendants(pid int) {
	queue := childrenOf(nil, pid)
	for i := 0; i < len(queue) && i < maxDescendants; i++ {
		_ = unix.Kill(queue[i], unix.SIGKILL)
		queue = childrenOf(queue, queue[i])
	}
}

// childrenOf appends the children of all threads of pid to pids.
func childrenOf(pids []int, pid int) []int {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	threads, err := os.ReadDir(dir)
	if err != nil {
		return pids // it has ended
	}
	for _, t := range threads {
		data, err := os.ReadFile(dir + "/" + t.Name() + "/children")
		if errors.Is(err, os.ErrNotExist) {
			if _, err := os.Stat("/proc/self/task/" + strconv.Itoa(os.Getpid()) + "/children"); err != nil {
				return childrenByScan(pids, pid) // a kernel without CONFIG_PROC_CHILDREN
			}
		}
		for f := range bytes.FieldsSeq(data) {
			if n, err := strconv.Atoi(string(f)); err == nil && n > 1 {
				pids = append(pids, n)
			}
		}
	}
	return pids
}

// childrenByScan is childrenOf by looking at every process.
func childrenByScan(pids []int, pid int) []int {
	all, err := os.ReadDir("/proc")
	if err != nil {
		return pids
	}
	for _, e := range all {
		n, err := strconv.Atoi(e.Name())
		if err != nil || n <= 1 {
			continue
		}
		if data, err := os.ReadFile("/proc/" + e.Name() + "/stat"); err == nil && parentIn(data) == pid {
			pids = append(pids, n)
		}
	}
	return pids
}

// parentIn is the parent in a /proc/PID/stat: the second field after the name,
// which is in parentheses and may contain any byte.
func parentIn(stat []byte) int {
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 2 {
		return 0
	}
	n, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return 0
	}
	return n
}

// killUser kills every process of the user that commands run as, in one system
// call that no fork can outrun. It is for those who fork faster than they can
// be listed. It needs no other thread's help: in the kernel, credentials
// belong to a thread, and the saved user id 0 leads back.
func (h *helper) killUser() {
	uid := uintptr(h.uid)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, 0); errno != 0 {
		return
	}
	_, _, _ = unix.RawSyscall(unix.SYS_KILL, ^uintptr(0), uintptr(unix.SIGKILL), 0)
	_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0)
	if errno != 0 {
		// Half a helper is worse than none; the worker starts another.
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	}
}
