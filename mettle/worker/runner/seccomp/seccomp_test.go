//go:build linux && (amd64 || arm64)

package seccomp

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// verdict is what the filter says of a call.
func verdict(t *testing.T, s Start, arch, number uint32, args ...uint64) string {
	t.Helper()
	vm, err := bpf.NewVM(program(s))
	if err != nil {
		t.Fatal(err)
	}
	// The machine of package bpf is big endian.
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[offsetNumber:], number)
	binary.BigEndian.PutUint32(data[offsetArch:], arch)
	for i, a := range args {
		binary.BigEndian.PutUint32(data[16+8*i:], uint32(a))
		binary.BigEndian.PutUint32(data[20+8*i:], uint32(a>>32))
	}
	n, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	switch v := uint32(n); v & unix.SECCOMP_RET_ACTION_FULL {
	case unix.SECCOMP_RET_ALLOW:
		return "allow"
	case unix.SECCOMP_RET_KILL_PROCESS:
		return "kill"
	case unix.SECCOMP_RET_ERRNO:
		return unix.ErrnoName(unix.Errno(v & unix.SECCOMP_RET_DATA))
	default:
		return fmt.Sprintf("%#x", v)
	}
}

func TestProgram(t *testing.T) {
	const high = 0xdead << 32 // what the kernel does not look at
	for _, tc := range []struct {
		name   string
		number uint32
		args   []uint64
		want   string
	}{
		{"read", unix.SYS_READ, nil, "allow"},
		{"execve", unix.SYS_EXECVE, nil, "allow"},
		{"ptrace", unix.SYS_PTRACE, nil, "allow"},
		{"a call of the future", 1000, nil, "allow"},
		{"mount", unix.SYS_MOUNT, nil, "EPERM"},
		{"io_uring_setup", unix.SYS_IO_URING_SETUP, nil, "ENOSYS"},
		{"clone of a thread", unix.SYS_CLONE, []uint64{unix.CLONE_VM | unix.CLONE_THREAD | unix.CLONE_SIGHAND}, "allow"},
		{"clone of a process", unix.SYS_CLONE, []uint64{uint64(unix.SIGCHLD)}, "allow"},
		{"clone with a user namespace", unix.SYS_CLONE, []uint64{high | unix.CLONE_NEWUSER | uint64(unix.SIGCHLD)}, "EPERM"},
		{"clone with a mount namespace", unix.SYS_CLONE, []uint64{unix.CLONE_NEWNS}, "EPERM"},
		{"clone3", unix.SYS_CLONE3, []uint64{1, 88, 0}, "ENOSYS"},
		{"unshare files", unix.SYS_UNSHARE, []uint64{unix.CLONE_FILES | unix.CLONE_FS}, "allow"},
		{"unshare users", unix.SYS_UNSHARE, []uint64{unix.CLONE_NEWUSER | unix.CLONE_NEWNET}, "EPERM"},
		{"unshare time", unix.SYS_UNSHARE, []uint64{unix.CLONE_NEWTIME}, "EPERM"},
		{"size of a terminal", unix.SYS_IOCTL, []uint64{0, unix.TIOCGWINSZ}, "allow"},
		{"TIOCSTI", unix.SYS_IOCTL, []uint64{0, unix.TIOCSTI}, "EPERM"},
		{"TIOCSTI, disguised", unix.SYS_IOCTL, []uint64{0, high | unix.TIOCSTI}, "EPERM"},
		{"TIOCLINUX", unix.SYS_IOCTL, []uint64{0, unix.TIOCLINUX}, "EPERM"},
		{"TIOCSETD", unix.SYS_IOCTL, []uint64{0, unix.TIOCSETD}, "EPERM"},
		{"AF_UNIX", unix.SYS_SOCKET, []uint64{unix.AF_UNIX, unix.SOCK_STREAM}, "allow"},
		{"AF_INET", unix.SYS_SOCKET, []uint64{unix.AF_INET, unix.SOCK_STREAM}, "allow"},
		{"AF_INET6", unix.SYS_SOCKET, []uint64{unix.AF_INET6, unix.SOCK_DGRAM}, "allow"},
		{"interfaces", unix.SYS_SOCKET, []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE}, "allow"},
		{"sockets", unix.SYS_SOCKET, []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_INET_DIAG}, "allow"},
		{"devices", unix.SYS_SOCKET, []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_KOBJECT_UEVENT}, "allow"},
		{"firewall", unix.SYS_SOCKET, []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER}, "EPROTONOSUPPORT"},
		{"AF_VSOCK", unix.SYS_SOCKET, []uint64{unix.AF_VSOCK, unix.SOCK_STREAM}, "EAFNOSUPPORT"},
		{"AF_VSOCK, disguised", unix.SYS_SOCKET, []uint64{high | unix.AF_VSOCK, unix.SOCK_STREAM}, "EAFNOSUPPORT"},
		{"AF_ALG", unix.SYS_SOCKET, []uint64{unix.AF_ALG, unix.SOCK_SEQPACKET}, "EAFNOSUPPORT"},
		{"AF_PACKET", unix.SYS_SOCKET, []uint64{unix.AF_PACKET, unix.SOCK_RAW}, "EAFNOSUPPORT"},
		{"a pair", unix.SYS_SOCKETPAIR, []uint64{unix.AF_UNIX, unix.SOCK_STREAM}, "allow"},
		{"a pair of AF_TIPC", unix.SYS_SOCKETPAIR, []uint64{unix.AF_TIPC, unix.SOCK_STREAM}, "EAFNOSUPPORT"},
		{"setarch -R", unix.SYS_PERSONALITY, []uint64{unixAddrNoRandomize}, "allow"},
		{"linux32", unix.SYS_PERSONALITY, []uint64{unixPerLinux32}, "allow"},
		{"which personality", unix.SYS_PERSONALITY, []uint64{askPersonality}, "allow"},
		{"READ_IMPLIES_EXEC", unix.SYS_PERSONALITY, []uint64{0x0400000}, "EPERM"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := verdict(t, Clone, auditArch, tc.number, tc.args...); got != tc.want {
				t.Errorf("got %s, want %s", got, tc.want)
			}
			if got := verdict(t, Clone, auditArch^1, tc.number, tc.args...); got != "kill" {
				t.Errorf("by another kind of processor's number: got %s, want kill", got)
			}
			if otherABI == 0 {
				return
			}
			if got := verdict(t, Clone, auditArch, tc.number|otherABI, tc.args...); got != "ENOSYS" {
				t.Errorf("by x32: got %s, want ENOSYS", got)
			}
		})
	}
}

func TestProgram_cloneInto(t *testing.T) {
	if got := verdict(t, CloneInto, auditArch, unix.SYS_CLONE3, 1, 88, 0); got != "allow" {
		t.Errorf("as package syscall calls it: got %s, want allow", got)
	}
	if got := verdict(t, CloneInto, auditArch, unix.SYS_CLONE3, 1, 88, 0x7f00); got != "ENOSYS" {
		t.Errorf("as a libc does: got %s, want ENOSYS", got)
	}
}

func TestRules(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[uint32]string{}
	check := func(name string, number uint32) {
		if other, twice := seen[number]; twice {
			t.Errorf("%s and %s have the same number %d", name, other, number)
		}
		seen[number] = name
		if !strings.Contains(string(readme), "`"+name+"`") {
			t.Errorf("README.md does not list %s", name)
		}
	}
	for _, c := range refused() {
		check(c.name, c.number)
		if got, want := verdict(t, Clone, auditArch, c.number), unix.ErrnoName(c.errno); got != want {
			t.Errorf("%s: got %s, want %s", c.name, got, want)
		}
	}
	for _, c := range conditional(Clone) {
		check(c.name, c.number)
	}
}

const installVar = "SECCOMP_TEST_INSTALL"

// TestInstall_kernel has the kernel take the filter, in a process of its own: none can
// be taken off again.
func TestInstall_kernel(t *testing.T) {
	if os.Getenv(installVar) == "" {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestInstall_kernel$", "-test.v")
		cmd.Env = append(os.Environ(), installVar+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	runtime.LockOSThread() // for good
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := Install(CloneInto); err != nil {
		t.Fatal(err)
	}
	if err := Install(Clone); err != nil {
		t.Fatal(err) // what is refused by either is refused
	}
	for _, c := range refused() {
		if _, _, errno := unix.RawSyscall6(uintptr(c.number), 0, 0, 0, 0, 0, 0); errno != c.errno {
			t.Errorf("%s: %v, want %v", c.name, errno, c.errno)
		}
	}
	if _, err := unix.Socket(unix.AF_ALG, unix.SOCK_SEQPACKET, 0); err != unix.EAFNOSUPPORT {
		t.Errorf("AF_ALG: %v", err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(fd); err != nil {
		t.Error(err)
	}
	if err := unix.Unshare(unix.CLONE_NEWUSER); err != unix.EPERM {
		t.Errorf("unshare: %v", err)
	}
}
