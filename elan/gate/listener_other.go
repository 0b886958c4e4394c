//go:build !linux

package gate

import "net"

// watched is c, which calls closed when it is.
func watched(c net.Conn, closed func()) net.Conn { return &watchedConn{Conn: c, closed: closed} }
