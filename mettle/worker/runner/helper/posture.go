//go:build linux

package helper

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// posture is what commands inherit of the helper, and others of the same user may
// change: a command of that user could have each later one on this slot fail by it, or
// run at the pace of the slowest.
type posture struct {
	limits  [rlimits]unix.Rlimit
	threads [2]scheduling
}

// rlimits is how many limits the kernel has.
const rlimits = 16

// scheduling is that of one thread.
type scheduling struct {
	attr unix.SchedAttr
	cpus unix.CPUSet
	io   uintptr
}

// watchPosture has the helper look after each command, where it could have changed
// something. The second thread is that on which commands start.
func (h *helper) watchPosture() {
	if h.uid >= 0 && h.uid != os.Geteuid() {
		return // the kernel forbids it
	}
	h.threads = [2]int{unix.Gettid(), unix.Gettid()}
	if h.starter != nil {
		h.threads[1] = h.starter.tid
	}
	h.begun, h.watched = h.posture(), true
}

// isDisturbed reports whether something is not what it was. Then the helper serves no
// more: what a hard limit was, only root can restore.
func (h *helper) isDisturbed() bool { return h.watched && h.posture() != h.begun }

func (h *helper) posture() (p posture) {
	for i := range p.limits {
		_ = unix.Prlimit(0, i, nil, &p.limits[i]) // zero where there is no such limit
	}
	for i, tid := range h.threads {
		p.threads[i] = schedulingOf(tid)
	}
	return p
}

// schedulingOf is that of a thread of this process. What the kernel does not tell is
// zero, each time.
func schedulingOf(tid int) (s scheduling) {
	const ioOfThread = 1 // IOPRIO_WHO_PROCESS
	_, _, _ = unix.RawSyscall6(unix.SYS_SCHED_GETATTR, uintptr(tid), uintptr(unsafe.Pointer(&s.attr)), unsafe.Sizeof(s.attr), 0, 0, 0)
	_, _, _ = unix.RawSyscall(unix.SYS_SCHED_GETAFFINITY, uintptr(tid), unsafe.Sizeof(s.cpus), uintptr(unsafe.Pointer(&s.cpus)))
	s.io, _, _ = unix.RawSyscall(unix.SYS_IOPRIO_GET, ioOfThread, uintptr(tid), 0)
	return s
}
