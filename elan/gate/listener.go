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
		e, ok := endsOf(c.RemoteAddr(), c.LocalAddr())
		if !ok {
			return c, nil
		}
		cn := newConn(l.gate, nil)
		cn.ends = e
		w := watched(c, func() { l.gate.disconnect(cn) })
		cn.close = func() { _ = w.Close() } // what it says concerns nobody
		if reason := l.gate.connect(cn); reason != "" {
			l.gate.refuse(e.client.Addr(), reason)
			_ = c.Close() // nothing was sent on it
			continue
		}
		return w, nil
	}
}

// The reasons for refusing a connection.
const (
	tooMany            = "total"
	tooManyFromAddress = "address"
)

// connect takes a connection in, or returns why it may not come in.
func (g *Gate) connect(cn *conn) (reason string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.open) >= g.o.MaxConnections {
		return tooMany
	}
	from := cn.ends.client.Addr()
	c := g.clients[from]
	if c == nil {
		c = &client{}
		g.clients[from] = c
	}
	if c.conns >= g.o.MaxConnectionsPerAddress {
		return tooManyFromAddress
	}
	c.conns++
	cn.client = c
	g.open[cn] = struct{}{}
	// There may be one already, that the client has reset and gRPC not closed yet.
	g.conns[cn.ends] = cn
	return ""
}

// shut closes the connection, if it can be, and counts that. Its calls end.
func (cn *conn) shut(counter prometheus.Counter) {
	if cn.close != nil {
		counter.Inc()
		cn.close()
	}
}

func (g *Gate) disconnect(cn *conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.open, cn)
	if g.conns[cn.ends] == cn {
		delete(g.conns, cn.ends)
	}
	if cn.client.conns--; cn.client.conns == 0 {
		delete(g.clients, cn.ends.client.Addr())
	}
}

// connected is how many connections there are.
func (g *Gate) connected() int {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return len(g.open)
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
