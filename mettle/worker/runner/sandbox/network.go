//go:build linux

package sandbox

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// network is the network namespace of the commands' thread.
type network struct {
	sockets int // its file of statistics, open
	buf     [1024]byte
}

// open readies a new namespace.
func (n *network) open() error {
	if err := raiseLoopback(); err != nil {
		return fmt.Errorf("loopback interface: %w", err)
	}
	const file = "/proc/thread-self/net/sockstat"
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: file, Err: err}
	}
	n.sockets = fd
	return nil
}

// renew makes a new namespace if the last command has left something in this one: a
// connection whose processes are dead, but which the kernel keeps, and its port with
// it, for up to a minute.
func (n *network) renew() error {
	if !n.lingers() {
		return nil
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("new network namespace: %w", err)
	}
	unix.Close(n.sockets) //nolint:errcheck // it was read only
	return n.open()
}

// lingers reports whether there are TCP connections. Other sockets end with their
// processes.
func (n *network) lingers() bool {
	size, err := unix.Pread(n.sockets, n.buf[:], 0)
	if err != nil {
		return true
	}
	for line := range bytes.Lines(n.buf[:size]) {
		// "TCP: inuse 0 orphan 0 tw 0 alloc 2 mem 0", of which orphan, alloc and mem
		// are those of the whole machine.
		if !bytes.HasPrefix(line, []byte("TCP: ")) {
			continue
		}
		return !bytes.HasPrefix(line, []byte("TCP: inuse 0 ")) || !bytes.Contains(line, []byte(" tw 0 "))
	}
	return true
}

func raiseLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // only a handle
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}
