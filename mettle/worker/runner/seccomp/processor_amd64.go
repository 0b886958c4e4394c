//go:build linux

package seccomp

import "golang.org/x/sys/unix"

const (
	auditArch = unix.AUDIT_ARCH_X86_64
	// otherABI is where the numbers of x32 begin: the same calls by other numbers.
	otherABI = 0x40000000
)

// ofThisProcessor are calls that only it has.
func ofThisProcessor() []call {
	return []call{
		{"iopl", unix.SYS_IOPL, unix.EPERM},
		{"ioperm", unix.SYS_IOPERM, unix.EPERM},
		{"uselib", unix.SYS_USELIB, unix.ENOSYS},
		{"ustat", unix.SYS_USTAT, unix.ENOSYS},
		{"_sysctl", unix.SYS__SYSCTL, unix.ENOSYS},
		{"create_module", unix.SYS_CREATE_MODULE, unix.ENOSYS},
		{"get_kernel_syms", unix.SYS_GET_KERNEL_SYMS, unix.ENOSYS},
		{"query_module", unix.SYS_QUERY_MODULE, unix.ENOSYS},
	}
}
