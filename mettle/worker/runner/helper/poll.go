//go:build linux

package helper

import (
	"errors"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// brief is for how long the helper waits without the Go runtime's knowledge: less
// than the 10 ms after which that would interrupt a thread.
const brief = 8 * time.Millisecond

// poll is poll(2), and an interruption no error. What happens soon, as the end of a
// short command or the next one does, is waited for without telling the runtime: it
// would take this thread's place among the runnable ones, and its monitor thread
// would wake up every 20 µs for milliseconds each time that this one comes back,
// which was a third of what a helper cost. What takes longer is waited for as usual,
// so that a helper that has nothing to do does nothing.
func poll(fds []unix.PollFd, timeout time.Duration) error {
	n, err := pollUnseen(fds, min(timeout, brief))
	if n == 0 && err == nil && timeout > brief {
		_, err = unix.Poll(fds, int((timeout-brief)/time.Millisecond))
	}
	if errors.Is(err, unix.EINTR) {
		return nil
	}
	return err
}

// pollUnseen is poll without a word to the runtime.
func pollUnseen(fds []unix.PollFd, timeout time.Duration) (int, error) {
	ts := unix.NsecToTimespec(int64(timeout))
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds[0])), uintptr(len(fds)), uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil //nolint:gosec // at most len(fds)
}

// ignoreChildren has the kernel send no SIGCHLD: the helper hears of its children by
// other means, and the runtime's handler would run for each. It is the default
// action, and not SIG_IGN, with which the kernel would reap them itself.
func ignoreChildren() error { return setDefault(unix.SIGCHLD) }

// ignoreAttacks has the init of a PID namespace hear none of the signals that end a Go
// program: the kernel keeps from it what it has no handler for, whichever process of the
// namespace it is from. Commands may be of the same user.
func ignoreAttacks() error {
	if os.Getpid() != 1 {
		return nil
	}
	for _, s := range []unix.Signal{
		unix.SIGQUIT, unix.SIGILL, unix.SIGTRAP, unix.SIGABRT, unix.SIGBUS, unix.SIGFPE, unix.SIGSEGV, unix.SIGSTKFLT, unix.SIGSYS,
	} {
		if err := setDefault(s); err != nil {
			return err
		}
	}
	return nil
}

// setDefault has a signal do what it does to a program that knows nothing of it.
func setDefault(s unix.Signal) error {
	var action [64]byte // zeros: SIG_DFL, no flags, nothing masked; no port has a larger one
	const sigsetBytes = 8
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&action)), 0, sigsetBytes, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
