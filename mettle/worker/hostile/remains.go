//go:build linux

package hostile

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// leaveKey leaves a key where the next command would look for one.
func leaveKey(ring int) error {
	_, err := unix.AddKey("user", leftName(), []byte("x"), ring)
	return err
}

// leaveSysV leaves one object of each kind.
func leaveSysV() error {
	key := uintptr(sysVKey())
	return errors.Join(
		call(unix.SYS_SHMGET, key, 4096, unix.IPC_CREAT|0o666),
		call(unix.SYS_SEMGET, key, 1, unix.IPC_CREAT|0o666),
		call(unix.SYS_MSGGET, key, unix.IPC_CREAT|0o666, 0))
}

// removeSysV is for the test to clean up after.
func removeSysV(key uintptr) {
	if id, _, errno := unix.Syscall(unix.SYS_SHMGET, key, 0, 0); errno == 0 {
		_ = call(unix.SYS_SHMCTL, id, unix.IPC_RMID, 0)
	}
	if id, _, errno := unix.Syscall(unix.SYS_SEMGET, key, 0, 0); errno == 0 {
		_, _, _ = unix.Syscall6(unix.SYS_SEMCTL, id, 0, unix.IPC_RMID, 0, 0, 0)
	}
	if id, _, errno := unix.Syscall(unix.SYS_MSGGET, key, 0, 0); errno == 0 {
		_ = call(unix.SYS_MSGCTL, id, unix.IPC_RMID, 0)
	}
}

// leaveQueue leaves a POSIX message queue.
func leaveQueue() error { return openQueue(unix.O_CREAT | unix.O_RDWR) }

func openQueue(flags int) error {
	name, err := unix.BytePtrFromString(leftName())
	if err != nil {
		return err
	}
	fd, _, errno := unix.Syscall6(unix.SYS_MQ_OPEN, uintptr(unsafe.Pointer(name)), uintptr(flags), 0o666, 0, 0, 0) //nolint:gosec // flags
	if errno != 0 {
		return errno
	}
	return unix.Close(int(fd))
}

func removeQueue(name string) {
	if p, err := unix.BytePtrFromString(name); err == nil {
		_ = call(unix.SYS_MQ_UNLINK, uintptr(unsafe.Pointer(p)), 0, 0)
	}
}

// queueOf tells of a queue that was left.
func queueOf() string {
	if openQueue(unix.O_RDONLY) == nil {
		return "one"
	}
	return ""
}

// lockInput takes a lock that others may want, and keeps it in a process that stays.
func lockInput() error {
	f, err := os.Open("big")
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("somebody else has it: %v", err) //nolint:errorlint // it is no refusal
	}
	cmd := exec.Command("sleep", "1000") //nolint:noctx // to be left behind
	cmd.ExtraFiles = []*os.File{f}
	return cmd.Start()
}

func watchInputs() error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	_, err = unix.InotifyAddWatch(fd, "big", unix.IN_ALL_EVENTS)
	return err
}

// leaveListeners leaves a process that listens at a port and at an abstract socket.
func leaveListeners() error {
	tcp, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", leftPort())) //nolint:noctx // a test's program
	if err != nil {
		return err
	}
	unixSocket, err := net.Listen("unix", "@"+leftName()) //nolint:noctx // likewise
	if err != nil {
		return err
	}
	one, err := tcp.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	two, err := unixSocket.(*net.UnixListener).File()
	if err != nil {
		return err
	}
	cmd := exec.Command("sleep", "1000") //nolint:noctx // to be left behind
	cmd.ExtraFiles = []*os.File{one, two}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Start()
}

// leaveFixed leaves files and directories with a flag of chattr.
func leaveFixed(flag int) error {
	if err := os.MkdirAll("a/b", 0o700); err != nil {
		return err
	}
	if err := os.WriteFile("a/b/c", nil, 0o600); err != nil {
		return err
	}
	var all error
	for _, name := range []string{"a/b/c", "a/b", "a", "big", "."} {
		all = errors.Join(all, setFlags(name, flag))
	}
	return all
}

// makeDeep makes directories in each other, deeper than any path can say.
func makeDeep(name string, levels int, inner string) error {
	at, err := descend(unix.AT_FDCWD, name)
	for range levels {
		if err != nil {
			return err
		}
		at, err = descend(at, inner)
	}
	return err
}

// descend makes a directory and opens it, and closes at.
func descend(at int, name string) (int, error) {
	err := unix.Mkdirat(at, name, 0o755)
	next := -1
	if err == nil {
		next, err = unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	if at >= 0 {
		unix.Close(at) //nolint:errcheck // only a place
	}
	return next, err
}

func makeFiles(n int) error {
	if err := os.Mkdir("many", 0o755); err != nil { //nolint:gosec // as others do
		return err
	}
	for i := range n {
		fd, err := unix.Open(fmt.Sprintf("many/%d", i), unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return err
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
	return nil
}

// makeNames makes files with all the names that a file system takes and others may
// stumble over.
func makeNames() error {
	if err := os.Mkdir("names", 0o755); err != nil { //nolint:gosec // as others do
		return err
	}
	for _, name := range []string{strings.Repeat("n", 255), "a\nb", " ", "-rf", "*", "\\", "%s", "\x01", "ü", "..."} {
		if err := os.WriteFile("names/"+name, []byte(name), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func makeSocket() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Bind(fd, &unix.SockaddrUnix{Name: "out"})
}

// leaveWaiting leaves a process that waits in the kernel, out of the reach of all
// signals but SIGKILL, for a child of vfork, which is stopped.
func leaveWaiting() error {
	cmd := exec.Command("/proc/self/exe", vforkName) //nolint:noctx // to be left behind
	cmd.Args[0] = ProgramName
	if err := cmd.Start(); err != nil {
		return err
	}
	for start := time.Now(); time.Since(start) < 20*time.Second; time.Sleep(time.Millisecond) {
		stat := read(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		for child := range strings.FieldsSeq(stat) {
			if strings.HasPrefix(afterName(read("/proc/"+child+"/stat")), " T") {
				return nil
			}
		}
	}
	return errors.New("no child has stopped")
}

const vforkName = "vfork-and-wait"

// vfork makes a child that stops at once, and waits for it.
func vfork() error {
	runtime.LockOSThread()
	pid, _, errno := unix.RawSyscall(unix.SYS_CLONE, unix.CLONE_VFORK|uintptr(unix.SIGCHLD), 0, 0)
	if errno != 0 {
		return errno
	}
	if pid == 0 {
		self, _, _ := unix.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
		_, _, _ = unix.RawSyscall(unix.SYS_KILL, self, uintptr(unix.SIGSTOP), 0)
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
	return nil
}

// orphans leaves processes that lose their parents again and again.
func orphans() error {
	for range 20 {
		cmd := exec.Command("sh", "-c", "(setsid sh -c '(sleep 1000 & sleep 1000 &) & sleep 1000' &) &") //nolint:noctx // to be left behind
		if err := cmd.Run(); err != nil {
			return err
		}
	}
	return nil
}

// forkBomb leaves a program that starts itself three times, and so do these: up to a
// number that the machine bears.
func forkBomb() error {
	limit := unix.Rlimit{Cur: 300, Max: 300}
	if err := unix.Setrlimit(unix.RLIMIT_NPROC, &limit); err != nil {
		return err
	}
	const bomb = "#!/bin/sh\ni=0; while [ $i -lt 3 ]; do ./bomb & i=$((i+1)); done 2>/dev/null; sleep 1000\n"
	if err := os.WriteFile("bomb", []byte(bomb), 0o700); err != nil { //nolint:gosec // a program
		return err
	}
	if err := exec.Command("sh", "-c", "./bomb 2>/dev/null &").Run(); err != nil { //nolint:noctx // at once
		return err
	}
	time.Sleep(200 * time.Millisecond) // for it to grow
	return nil
}

// RemoveIPC removes the SysV objects and the message queue that an attack with that
// mark has left on the host.
func RemoveIPC(mark string) {
	removeSysV(uintptr(sysVKeyOf(mark))) //nolint:gosec // a small number
	removeQueue(namePrefix + mark)
}

// takeDescriptor waits for an accomplice's descriptor, and writes to its file when the
// worker has made that a blob.
func takeDescriptor() error {
	l, err := net.Listen("unix", "@"+leftName()+"-fd") //nolint:noctx // a test's program
	if err != nil {
		return err
	}
	if err := os.WriteFile("listens", nil, 0o600); err != nil {
		return err
	}
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	var b [1]byte
	control := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(b[:], control)
	if err != nil {
		return err
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil || len(messages) == 0 {
		return fmt.Errorf("no descriptor: %v", err) //nolint:errorlint // it is no refusal
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	// A page that is dirty already.
	m, err := unix.Mmap(fds[0], 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	m[0] = 'g'
	if _, err := conn.Write([]byte{1}); err != nil {
		return err
	}
	for start := time.Now(); time.Since(start) < 20*time.Second; time.Sleep(time.Millisecond) {
		var st unix.Stat_t
		if err := unix.Fstat(fds[0], &st); err != nil {
			return err
		}
		// It is a blob, or the slot has been emptied.
		if st.Mode&0o777 == 0o444 || st.Nlink == 0 {
			copy(m, "evil")
			return unix.Msync(m, unix.MS_SYNC)
		}
	}
	return errors.New("the file did not become a blob")
}

// giveDescriptor makes an output, and hands its descriptor to an accomplice.
func giveDescriptor() error {
	f, err := os.Create("out")
	if err != nil {
		return err
	}
	if _, err := f.WriteString(strings.Repeat("good", 100_000)); err != nil {
		return err
	}
	conn, err := net.DialTimeout("unix", "@"+leftName()+"-fd", 5*time.Second) //nolint:noctx // bounded
	if err != nil {
		return err
	}
	if _, _, err := conn.(*net.UnixConn).WriteMsgUnix([]byte{1}, unix.UnixRights(int(f.Fd())), nil); err != nil {
		return err
	}
	var b [1]byte
	_, err = conn.Read(b[:])
	return err
}
