//go:build linux

package sandbox

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Landlock is of use here for one thing that namespaces can't do: an abstract Unix
// socket belongs to a network namespace, so a command that has the host's network has
// the abstract sockets of the host's services, X and D-Bus among them.
//
// It is none for a second wall around writes. Its rules are of directories that lie
// above a path, and it passes over the one that a mount covers: the input root, a mount
// at the top that is another for each command, would need a rule of its own each time,
// and a thread can only be restricted further, sixteen times at most.

// landlockScopes is the version of Landlock that has scopes: Linux 6.12.
const landlockScopes = 6

// keepFromAbstractSockets keeps the calling thread, and all that it starts from now on,
// from abstract sockets that others have made, where the kernel can.
func keepFromAbstractSockets() error {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 || version < landlockScopes {
		return nil // it has no Landlock, or an old one
	}
	attr := unix.LandlockRulesetAttr{Scoped: unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET}
	// What comes behind Scoped is of later versions.
	size := unsafe.Offsetof(attr.Scoped) + unsafe.Sizeof(attr.Scoped)
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if errno != 0 {
		return fmt.Errorf("Landlock ruleset: %w", errno) //nolint:staticcheck // a name
	}
	defer unix.Close(int(fd)) //nolint:errcheck // nothing was written
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
		return fmt.Errorf("restrict by Landlock: %w", errno)
	}
	return nil
}
