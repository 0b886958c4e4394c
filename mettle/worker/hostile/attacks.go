//go:build linux

package hostile

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The variables that a Command gets, beside PATH. All are of Host.
const (
	markVariable     = "MARK"      // unique to the test
	secretVariable   = "SECRET"    // a file that only the worker's user may read
	publicVariable   = "PUBLIC"    // a file that everybody may read
	openVariable     = "OPEN"      // a directory that everybody may write to
	storeVariable    = "STORE"     // the store's directory
	workVariable     = "WORK"      // the worker's
	blobVariable     = "BLOB"      // a file of the store
	workerVariable   = "WORKER"    // the worker's process
	portVariable     = "PORT"      // where the worker listens for TCP on loopback
	socketVariable   = "SOCKET"    // its unix socket
	leftPortVariable = "LEFT_PORT" // a port that nobody uses
)

// leftName is in the name of all that attacks leave where others can see it.
func leftName() string { return namePrefix + os.Getenv(markVariable) }

const namePrefix = "hostile-"

// sysVKey is that of SysV objects that are left.
func sysVKey() int { return sysVKeyOf(os.Getenv(markVariable)) }

func sysVKeyOf(mark string) int {
	n, _, _ := strings.Cut(mark, "-")
	key, _ := strconv.Atoi(n)
	return 0x4d000000 + key
}

func leftPort() int { return number(leftPortVariable) }

func number(variable string) int {
	n, _ := strconv.Atoi(os.Getenv(variable))
	return n
}

// attacks are what scripts can't do. The error says why it was not possible.
func attacks() map[string]func() error {
	return map[string]func() error{
		"mmap":             mapInput,
		"reopen":           reopenInput,
		"xattr":            func() error { return unix.Setxattr("big", "user."+leftName(), []byte("x"), 0) },
		"utimes":           func() error { return os.Chtimes("big", time.Now(), time.Now()) },
		"cover":            coverTracks,
		"flags":            func() error { return setFlags("big", 0x10) },
		"immutable":        func() error { return leaveFixed(0x10) },
		"append-only":      func() error { return leaveFixed(0x20) },
		"trace":            func() error { return trace(number(workerVariable)) },
		"trace-parent":     func() error { return trace(os.Getppid()) },
		"read-memory":      func() error { return readMemory(number(workerVariable)) },
		"limits":           raiseLimits,
		"nice":             func() error { return unix.Setpriority(unix.PRIO_PROCESS, 0, -20) },
		"realtime":         realtime,
		"root":             becomeRoot,
		"groups":           func() error { return unix.Setgroups([]int{0}) },
		"mount":            func() error { return unix.Mount("none", "dir", "tmpfs", 0, "") },
		"bind":             func() error { return unix.Mount("/", "dir", "", unix.MS_BIND|unix.MS_REC, "") },
		"remount":          func() error { return unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, "") },
		"umount":           func() error { return unix.Unmount("/proc", unix.MNT_DETACH) },
		"pivot":            func() error { return unix.PivotRoot(".", "dir") },
		"chroot":           func() error { return unix.Chroot("dir") },
		"unshare-user":     makeUserNamespace,
		"unshare-mount":    func() error { return unix.Unshare(unix.CLONE_NEWNS) },
		"setns":            enterNamespaces,
		"block-device":     func() error { return unix.Mknod("dev", unix.S_IFBLK|0o666, int(unix.Mkdev(8, 0))) }, //nolint:gosec // a small number
		"character-device": func() error { return unix.Mknod("dev", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 1))) }, //nolint:gosec // likewise
		"host-name":        func() error { return unix.Sethostname([]byte("hostile")) },
		"clock":            func() error { return call(unix.SYS_SETTIMEOFDAY, 0, 0, 0) },
		"reboot":           reboot,
		"module":           loadModule,
		"bpf":              bpf,
		"perf":             perf,
		"uring":            uring,
		"vsock":            func() error { return openSocket(unix.AF_VSOCK, unix.SOCK_STREAM, 0) },
		"packet":           func() error { return openSocket(unix.AF_PACKET, unix.SOCK_RAW, 0) },
		"raw":              func() error { return openSocket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP) },
		"kernel-log":       readKernelLog,
		"tiocsti":          typeAhead,
		"user-key":         func() error { return leaveKey(unix.KEY_SPEC_USER_KEYRING) },
		"session-key":      func() error { return leaveKey(unix.KEY_SPEC_SESSION_KEYRING) },
		"sysv":             leaveSysV,
		"queue":            leaveQueue,
		"lock":             lockInput,
		"watch":            watchInputs,
		"connect":          func() error { return connect("tcp", "127.0.0.1:"+os.Getenv(portVariable)) },
		"connect-unix":     func() error { return connect("unix", os.Getenv(socketVariable)) },
		"connect-abstract": func() error { return connect("unix", "@"+leftName()+"-worker") },
		"metadata":         metadataAddress,
		"listen":           leaveListeners,
		"deep":             func() error { return makeDeep("deep", 3_000, "d") }, // longer than a path can be
		"deepest":          func() error { return makeDeep("deep", 20_000, "d") },
		"deep-long":        func() error { return makeDeep("deep", 200, strings.Repeat("n", 255)) },
		"files":            func() error { return makeFiles(20_000) },
		"some-files":       func() error { return makeFiles(2_000) },
		"million":          func() error { return makeFiles(1_000_000) },
		"names":            makeNames,
		"socket":           makeSocket,
		"vfork":            leaveWaiting,
		vforkName:          vfork,
		"orphans":          orphans,
		"fork-bomb":        forkBomb,
		"take":             takeDescriptor,
		"give":             giveDescriptor,
	}
}

func call(trap, a, b, c uintptr) error {
	if _, _, errno := unix.Syscall(trap, a, b, c); errno != 0 {
		return errno
	}
	return nil
}

// mapInput writes to an input by a shared mapping of it.
func mapInput() error {
	fd, err := unix.Open("big", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	m, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(m, "evil")
	return unix.Msync(m, unix.MS_SYNC)
}

// reopenInput opens an input for writing by a descriptor for reading.
func reopenInput() error {
	f, err := os.Open("big")
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = w.WriteString("evil")
	return errors.Join(err, w.Close())
}

// coverTracks writes to an input, and sets mode and times back.
func coverTracks() error {
	st, err := os.Stat("big")
	if err != nil {
		return err
	}
	if err := os.Chmod("big", 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile("big", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString("evil")
	return errors.Join(err, f.Close(), os.Chmod("big", st.Mode()), os.Chtimes("big", st.ModTime(), st.ModTime()))
}

// setFlags sets a flag of chattr.
func setFlags(name string, flag int) error {
	f, err := os.Open(name) //nolint:gosec // the names are ours
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return errors.Join(errRefused, err) // a file system without them
	}
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags|flag)
}

// trace attaches to a process, without stopping it.
func trace(pid int) error {
	if pid == 0 {
		return unix.ESRCH
	}
	return call(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0) //nolint:gosec // a process id
}

func readMemory(pid int) error {
	var b [1]byte
	local := []unix.Iovec{{Base: &b[0], Len: 1}}
	_, err := unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: 0x400000, Len: 1}}, 0)
	if errors.Is(err, unix.EFAULT) {
		return nil // it was let in, and found nothing there
	}
	return err
}

func becomeRoot() error {
	err := unix.Setresuid(0, 0, 0)
	if errors.Is(err, unix.EINVAL) {
		err = errRefused // there is no root in its user namespace
	}
	return err
}

// raiseLimits raises each limit by what it may not.
func raiseLimits() error {
	var raised []string
	for _, limit := range []int{unix.RLIMIT_CORE, unix.RLIMIT_NOFILE, unix.RLIMIT_RTPRIO, unix.RLIMIT_NICE} {
		var l unix.Rlimit
		if err := unix.Getrlimit(limit, &l); err != nil {
			return err
		}
		if l.Max == unix.RLIM_INFINITY {
			continue
		}
		l.Max++
		if unix.Setrlimit(limit, &l) == nil {
			raised = append(raised, strconv.Itoa(limit))
		}
	}
	if len(raised) == 0 {
		return unix.EPERM
	}
	return nil
}

func realtime() error {
	priority := int32(10)
	return call(unix.SYS_SCHED_SETSCHEDULER, 0, 1 /* SCHED_FIFO */, uintptr(unsafe.Pointer(&priority)))
}

// enterNamespaces enters those of the first process that it sees.
func enterNamespaces() error {
	var all error
	for _, name := range []string{"mnt", "net", "pid", "ipc", "uts"} {
		f, err := os.Open(filepath.Join("/proc/1/ns", name))
		if err == nil {
			err = errors.Join(unix.Setns(int(f.Fd()), 0), f.Close())
		}
		if err == nil {
			return nil
		}
		all = errors.Join(all, err)
	}
	return all
}

// The following ask for what would harm the machine, in a way that is refused for
// want of rights before it is for its nonsense.

func reboot() error { return sane(call(unix.SYS_REBOOT, 0, 0, 0)) }

func loadModule() error { return sane(call(unix.SYS_INIT_MODULE, 0, 0, 0)) }

func bpf() error {
	var attr [128]byte
	attr[0] = 1                                                                      // BPF_PROG_TYPE_SOCKET_FILTER, without a program
	return sane(call(unix.SYS_BPF, 5, uintptr(unsafe.Pointer(&attr)), uintptr(128))) // BPF_PROG_LOAD
}

func sane(err error) error {
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EFAULT) || errors.Is(err, unix.ENOEXEC) || errors.Is(err, unix.E2BIG) {
		return nil
	}
	return err
}

// perf watches all processes on a processor.
func perf() error {
	fd, err := unix.PerfEventOpen(&unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{}))}, -1, 0, -1, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func uring() error {
	var params [120]byte
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 8, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return errno
	}
	return unix.Close(int(fd))
}

func openSocket(family, kind, protocol int) error {
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// makeUserNamespace starts a program in one.
func makeUserNamespace() error {
	cmd := exec.Command("true") //nolint:noctx // at once
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}
	return cmd.Run()
}

func readKernelLog() error {
	var b [64]byte
	_, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, b[:])
	return err
}

// typeAhead types a command at the terminal of whoever started the worker.
func typeAhead() error {
	fd, err := unix.Open("/dev/tty", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	c := byte('\n')
	return call(unix.SYS_IOCTL, uintptr(fd), unix.TIOCSTI, uintptr(unsafe.Pointer(&c)))
}

func connect(network, address string) error {
	conn, err := net.DialTimeout(network, address, 5*time.Second) //nolint:noctx // bounded
	if err != nil {
		return err
	}
	return conn.Close()
}

// metadataAddress looks for a way to where clouds give out credentials. No packet is
// sent.
func metadataAddress() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was sent
	return unix.Connect(fd, &unix.SockaddrInet4{Port: 80, Addr: [4]byte{169, 254, 169, 254}})
}
