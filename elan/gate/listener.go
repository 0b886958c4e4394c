package gate

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Listener is l with the limits on connections: one that is over them is closed
// at once. It is closed as l is.
func (g *Gate) Listener(l net.Listener) net.Listener { return &listener{Listener: l, gate: g} }

type listener struct {
	net.Listener
	gate *Gate
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err //nolint:wrapcheck // gRPC looks at it
		}
		tcp, ok := c.RemoteAddr().(*net.TCPAddr)
		if !ok {
			return c, nil
		}
		from := tcp.AddrPort()
		if reason := l.gate.connect(from); reason != "" {
			l.gate.refuse(from.Addr(), reason)
			_ = c.Close() // nothing was sent on it
			continue
		}
		w := watched(c, func() { l.gate.disconnect(from) })
		l.gate.setClose(from, func() { _ = w.Close() }) // what it says concerns nobody
		return w, nil
	}
}

// The reasons for refusing a connection.
const (
	tooMany            = "total"
	tooManyFromAddress = "address"
)

// connect takes a connection in, or returns why it may not come in.
func (g *Gate) connect(from netip.AddrPort) (reason string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.conns) >= g.o.MaxConnections {
		return tooMany
	}
	c := g.clients[from.Addr()]
	if c == nil {
		c = &client{}
		g.clients[from.Addr()] = c
	}
	if c.conns >= g.o.MaxConnectionsPerAddress {
		return tooManyFromAddress
	}
	c.conns++
	g.conns[from] = newConn(g, c)
	return ""
}

// setClose says how a connection that was taken in is closed.
func (g *Gate) setClose(from netip.AddrPort, f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.conns[from].close = f
}

// shut closes the connection, if it can be, and counts that. Its calls end.
func (cn *conn) shut(counter prometheus.Counter) {
	if cn.close != nil {
		counter.Inc()
		cn.close()
	}
}

func (g *Gate) disconnect(from netip.AddrPort) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c := g.conns[from].client
	delete(g.conns, from)
	if c.conns--; c.conns == 0 {
		delete(g.clients, from.Addr())
	}
}

// connected is how many connections there are.
func (g *Gate) connected() int {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return len(g.conns)
}

// refusals are what was refused and not yet logged.
type refusals struct {
	logged time.Time
	since  int
}

// logRefusals is how often refused connections are logged.
const logRefusals = 10 * time.Second

// refuse counts a connection that is refused.
func (g *Gate) refuse(from netip.Addr, reason string) {
	g.metrics.refused.WithLabelValues(reason).Inc()
	g.mu.Lock()
	g.refused.since++
	n, due := g.refused.since, time.Since(g.refused.logged) >= logRefusals
	if due {
		g.refused = refusals{logged: time.Now()}
	}
	g.mu.Unlock()
	if due {
		g.log.Warn("connections are refused: too many are open", "limit", reason, "address", from.String(), "refused", n)
	}
}

// watchedConn tells when it is closed.
type watchedConn struct {
	net.Conn
	once   sync.Once
	closed func()
}

// Close implements net.Conn.
func (c *watchedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.closed)
	return err //nolint:wrapcheck // the conn's own
}
