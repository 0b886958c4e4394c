//go:build linux

package seccomp

import "golang.org/x/sys/unix"

const (
	auditArch = unix.AUDIT_ARCH_AARCH64
	otherABI  = 0 // there is none
)

// ofThisProcessor are calls that only it has.
func ofThisProcessor() []call { return nil }
