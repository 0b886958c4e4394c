package gate

import (
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/mem"
)

// userTimeoutMillis is how long what was sent may go unacknowledged. gRPC would
// set it, to its keepalive's timeout, if it knew what kind of connection this is.
const userTimeoutMillis = 20_000

// watched is c, which calls closed when it is.
func watched(c net.Conn, closed func()) net.Conn {
	w := watchedConn{Conn: c, closed: closed}
	sys, ok := c.(syscall.Conn)
	if !ok {
		return &w
	}
	raw, err := sys.SyscallConn()
	if err != nil {
		return &w
	}
	// Where it can't be set, keepalive finds what is dead, only later.
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, userTimeoutMillis)
	})
	r := &readyConn{watchedConn: watchedConn{Conn: c, closed: closed}, raw: raw}
	r.try = r.tryRead
	return r
}

// readyConn has a buffer for reading only when there is something to read, as
// gRPC has it of connections that it knows: of thousands that are idle, each
// would have 128 KiB.
type readyConn struct {
	watchedConn
	raw syscall.RawConn
	try func(fd uintptr) bool // tryRead

	// What follows is of the one ReadOnReady that is going on.
	size int
	pool mem.BufferPool
	buf  *[]byte
	n    int
	err  error
}

// ReadOnReady is what gRPC asks connections for: it waits until there is something
// to read, and then reads up to size bytes into a buffer of pool.
func (c *readyConn) ReadOnReady(size int, pool mem.BufferPool) (*[]byte, int, error) {
	c.size, c.pool = size, pool
	err := c.raw.Read(c.try)
	buf, n, readErr := c.buf, c.n, c.err
	c.pool, c.buf, c.n, c.err = nil, nil, 0, nil
	switch {
	case err == nil && readErr == nil && n > 0:
		return buf, n, nil
	case buf != nil:
		pool.Put(buf)
	}
	switch {
	case err != nil:
		return nil, 0, err //nolint:wrapcheck // the conn's own
	case readErr != nil:
		return nil, 0, readErr //nolint:wrapcheck // as above
	}
	return nil, 0, io.EOF
}

// tryRead reads what is there, and reports whether there was something.
func (c *readyConn) tryRead(fd uintptr) bool {
	c.buf = c.pool.Get(c.size)
	for {
		c.n, c.err = syscall.Read(int(fd), *c.buf)
		if c.err != syscall.EINTR { //nolint:errorlint // an errno as it is
			break
		}
	}
	if c.err == syscall.EAGAIN { //nolint:errorlint // as above
		c.pool.Put(c.buf)
		c.buf = nil
		return false
	}
	return true
}
