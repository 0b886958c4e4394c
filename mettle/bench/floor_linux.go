package bench

import "syscall"

// namespaceAttr is for a process in namespaces of its own. No user is mapped into
// its user namespace, which would take three more files to write; and it shares
// memory with this process until the exec, as that of floor spawn does: Go does
// that by itself only where there is no user namespace, since the parent, which
// stands still meanwhile, could not write the maps.
func namespaceAttr() (*syscall.SysProcAttr, error) {
	const namespaces = syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID
	return &syscall.SysProcAttr{Cloneflags: namespaces | syscall.CLONE_VM | syscall.CLONE_VFORK}, nil
}
