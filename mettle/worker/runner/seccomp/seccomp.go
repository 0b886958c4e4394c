//go:build linux

// Package seccomp is a second wall of the sandbox: a filter of system calls that
// keeps a command from parts of the kernel that no build needs and that have been ways
// out of sandboxes. It is a list of what is refused, not of what is let through, so
// that a new system call of a new libc works.
//
// README.md beside this file lists what is refused, and how. A filter is inherited,
// and can't be taken off again. Where a call is let through whatever its arguments, as
// most are, the kernel looks up a bit for it (since Linux 5.11).
//
// Its caller is runner/sandbox, on the thread on which commands start. It assembles
// with golang.org/x/net/bpf, without cgo.
package seccomp

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// ErrUnsupported: there is no filter for this kind of processor.
var ErrUnsupported = errors.New("no filter of system calls for " + runtime.GOARCH)

// Supported reports whether there is a filter for this kind of processor.
func Supported() bool { return auditArch != 0 }

// Start is how the thread that is filtered starts commands.
type Start int

// The ways.
const (
	// Clone is by clone(2).
	Clone Start = iota
	// CloneInto is by the clone3(2) of package syscall, into a control group.
	CloneInto
)

// Install filters the calling thread and all that it starts from now on. The thread
// has set no_new_privs, and its goroutine is locked to it.
func Install(s Start) error {
	filter, err := assemble(s)
	if err != nil {
		return err
	}
	program := make([]unix.SockFilter, len(filter))
	for i, f := range filter {
		program[i] = unix.SockFilter{Code: f.Op, Jt: f.Jt, Jf: f.Jf, K: f.K}
	}
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]} //nolint:gosec // some hundred
	// Before Linux 5.16, the kernel takes a filter as a reason to slow the program
	// down by its mitigation of a speculative store bypass, unless told otherwise.
	for _, flags := range []uintptr{unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, 0} {
		_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
		if errno == 0 {
			return nil
		}
		if errno != unix.EINVAL || flags == 0 {
			return fmt.Errorf("filter system calls: %w", errno)
		}
	}
	return nil
}

func assemble(s Start) ([]bpf.RawInstruction, error) {
	if !Supported() {
		return nil, ErrUnsupported
	}
	return bpf.Assemble(program(s))
}

// The parts of struct seccomp_data.
const (
	offsetNumber = 0
	offsetArch   = 4
)

// offsetArg is where the lower half of an argument is: the processors that there are
// filters for are little endian, and of what is looked at here the kernel itself takes
// no more.
func offsetArg(i uint32) uint32 { return 16 + 8*i }

func load(offset uint32) bpf.Instruction { return bpf.LoadAbsolute{Off: offset, Size: 4} }

func allow() bpf.Instruction { return bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW} }

func refuse(errno unix.Errno) bpf.Instruction {
	return bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(errno)}
}

// program is the filter. A program of another kind of processor, which would have
// other numbers, is killed.
func program(s Start) []bpf.Instruction {
	p := []bpf.Instruction{
		load(offsetArch),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: auditArch, SkipTrue: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_KILL_PROCESS},
		load(offsetNumber),
	}
	if otherABI != 0 {
		p = append(p, bpf.JumpIf{Cond: bpf.JumpLessThan, Val: otherABI, SkipTrue: 1}, refuse(unix.ENOSYS))
	}
	for _, c := range conditional(s) {
		p = append(p, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: c.number, SkipTrue: uint8(len(c.then))}) //nolint:gosec // a few
		p = append(p, c.then...)
	}
	for _, r := range refused() {
		p = append(p, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: r.number, SkipTrue: 1}, refuse(r.errno))
	}
	return append(p, allow())
}
