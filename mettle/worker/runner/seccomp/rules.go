//go:build linux

package seccomp

import (
	"slices"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// call is a system call that is refused, whatever its arguments.
type call struct {
	name   string
	number uint32
	errno  unix.Errno
}

// refused lists them. ENOSYS is for what a program tries and does without, EPERM for
// what takes a right that it has not.
func refused() []call {
	return slices.Concat([]call{
		// Keys, which the kernel keeps per user and not per namespace.
		{"add_key", unix.SYS_ADD_KEY, unix.ENOSYS},
		{"keyctl", unix.SYS_KEYCTL, unix.ENOSYS},
		{"request_key", unix.SYS_REQUEST_KEY, unix.ENOSYS},
		// What takes programs into the kernel, or looks into it.
		{"bpf", unix.SYS_BPF, unix.EPERM},
		{"perf_event_open", unix.SYS_PERF_EVENT_OPEN, unix.EPERM},
		{"userfaultfd", unix.SYS_USERFAULTFD, unix.EPERM},
		{"syslog", unix.SYS_SYSLOG, unix.EPERM},
		{"lookup_dcookie", unix.SYS_LOOKUP_DCOOKIE, unix.EPERM},
		// Another way to most system calls, which a filter does not see.
		{"io_uring_setup", unix.SYS_IO_URING_SETUP, unix.ENOSYS},
		{"io_uring_enter", unix.SYS_IO_URING_ENTER, unix.ENOSYS},
		{"io_uring_register", unix.SYS_IO_URING_REGISTER, unix.ENOSYS},
		// Modules and kernels.
		{"init_module", unix.SYS_INIT_MODULE, unix.EPERM},
		{"finit_module", unix.SYS_FINIT_MODULE, unix.EPERM},
		{"delete_module", unix.SYS_DELETE_MODULE, unix.EPERM},
		{"kexec_load", unix.SYS_KEXEC_LOAD, unix.EPERM},
		// Mounts and namespaces.
		{"mount", unix.SYS_MOUNT, unix.EPERM},
		{"umount2", unix.SYS_UMOUNT2, unix.EPERM},
		{"pivot_root", unix.SYS_PIVOT_ROOT, unix.EPERM},
		{"chroot", unix.SYS_CHROOT, unix.EPERM},
		{"setns", unix.SYS_SETNS, unix.EPERM},
		{"open_tree", unix.SYS_OPEN_TREE, unix.ENOSYS},
		{"open_tree_attr", unix.SYS_OPEN_TREE_ATTR, unix.ENOSYS},
		{"move_mount", unix.SYS_MOVE_MOUNT, unix.ENOSYS},
		{"fsopen", unix.SYS_FSOPEN, unix.ENOSYS},
		{"fsconfig", unix.SYS_FSCONFIG, unix.ENOSYS},
		{"fsmount", unix.SYS_FSMOUNT, unix.ENOSYS},
		{"fspick", unix.SYS_FSPICK, unix.ENOSYS},
		{"mount_setattr", unix.SYS_MOUNT_SETATTR, unix.ENOSYS},
		// Files by their numbers, past directories.
		{"name_to_handle_at", unix.SYS_NAME_TO_HANDLE_AT, unix.EPERM},
		{"open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT, unix.EPERM},
		{"fanotify_init", unix.SYS_FANOTIFY_INIT, unix.EPERM},
		// The machine as a whole.
		{"acct", unix.SYS_ACCT, unix.EPERM},
		{"quotactl", unix.SYS_QUOTACTL, unix.EPERM},
		{"quotactl_fd", unix.SYS_QUOTACTL_FD, unix.EPERM},
		{"swapon", unix.SYS_SWAPON, unix.EPERM},
		{"swapoff", unix.SYS_SWAPOFF, unix.EPERM},
		{"reboot", unix.SYS_REBOOT, unix.EPERM},
		{"settimeofday", unix.SYS_SETTIMEOFDAY, unix.EPERM},
		{"clock_settime", unix.SYS_CLOCK_SETTIME, unix.EPERM},
		{"sethostname", unix.SYS_SETHOSTNAME, unix.EPERM},
		{"setdomainname", unix.SYS_SETDOMAINNAME, unix.EPERM},
		{"vhangup", unix.SYS_VHANGUP, unix.EPERM},
		{"nfsservctl", unix.SYS_NFSSERVCTL, unix.ENOSYS},
		{"kexec_file_load", unix.SYS_KEXEC_FILE_LOAD, unix.EPERM},
	}, ofThisProcessor())
}

// condition is a system call that is refused with some arguments. What it does then
// ends with a return.
type condition struct {
	name   string
	number uint32
	then   []bpf.Instruction
}

const (
	// newNamespaces are the flags of clone for namespaces.
	newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET
	// newByUnshare are those of unshare, without two that the thread itself makes, for
	// which a command lacks the capability.
	newByUnshare = newNamespaces&^(unix.CLONE_NEWIPC|unix.CLONE_NEWNET) | unix.CLONE_NEWTIME
	// personalities are what setarch asks for: 32 bits as the machine's name, an old
	// kernel's version, and addresses that are the same each time or lie low. Not so
	// a stack that can be executed.
	personalities = unixPerLinux32 | unixUname26 | unixAddrNoRandomize | unixAddrCompatLayout | unixAddrLimit3GB | unixAddrLimit32Bit

	unixPerLinux32       = 0x0008
	unixUname26          = 0x0020000
	unixAddrNoRandomize  = 0x0040000
	unixAddrCompatLayout = 0x0200000
	unixAddrLimit32Bit   = 0x0800000
	unixAddrLimit3GB     = 0x8000000
	askPersonality       = 0xffffffff // changes nothing
)

// conditional lists them, the commonest first.
func conditional(s Start) []condition {
	return []condition{
		{"ioctl", unix.SYS_IOCTL, []bpf.Instruction{
			// Into another's terminal, and another driver under one.
			load(offsetArg(1)),
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.TIOCSTI, SkipTrue: 3},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.TIOCLINUX, SkipTrue: 2},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.TIOCSETD, SkipTrue: 1},
			allow(), refuse(unix.EPERM),
		}},
		{"clone", unix.SYS_CLONE, []bpf.Instruction{
			load(offsetArg(0)),
			bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: newNamespaces, SkipTrue: 1},
			allow(), refuse(unix.EPERM),
		}},
		{"clone3", unix.SYS_CLONE3, clone3(s)},
		{"socket", unix.SYS_SOCKET, []bpf.Instruction{
			load(offsetArg(0)),
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AF_UNIX, SkipTrue: 8},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AF_INET, SkipTrue: 7},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AF_INET6, SkipTrue: 6},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.AF_NETLINK, SkipTrue: 6},
			load(offsetArg(2)),
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.NETLINK_ROUTE, SkipTrue: 3},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.NETLINK_INET_DIAG, SkipTrue: 2},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.NETLINK_KOBJECT_UEVENT, SkipTrue: 1},
			refuse(unix.EPROTONOSUPPORT), allow(), refuse(unix.EAFNOSUPPORT),
		}},
		{"socketpair", unix.SYS_SOCKETPAIR, []bpf.Instruction{
			load(offsetArg(0)),
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AF_UNIX, SkipTrue: 1},
			refuse(unix.EAFNOSUPPORT), allow(),
		}},
		{"unshare", unix.SYS_UNSHARE, []bpf.Instruction{
			load(offsetArg(0)),
			bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: newByUnshare, SkipTrue: 1},
			allow(), refuse(unix.EPERM),
		}},
		{"personality", unix.SYS_PERSONALITY, []bpf.Instruction{
			load(offsetArg(0)),
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: askPersonality, SkipTrue: 1},
			bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: ^uint32(personalities), SkipTrue: 1},
			allow(), refuse(unix.EPERM),
		}},
	}
}

// clone3 has its flags in memory, where a filter can't look; a libc that hears that
// there is none takes clone. Package syscall does not: where it is needed, it is let
// through as that calls it, with a third argument of 0. A command that does so too has
// the capabilities and the limit of user namespaces before it, and finds no group that it
// may clone into: see runner/sandbox.
func clone3(s Start) []bpf.Instruction {
	if s != CloneInto {
		return []bpf.Instruction{refuse(unix.ENOSYS)}
	}
	return []bpf.Instruction{
		load(offsetArg(2)),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1},
		refuse(unix.ENOSYS), allow(),
	}
}
