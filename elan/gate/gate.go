// Package gate keeps a gRPC server from being taken up by a few of its clients,
// be they many, slow, stuck or hostile. It bounds the connections, in all and from
// one address; it ends calls whose client neither sends nor takes anything for too
// long; it lets so many calls of one connection work on batches at once; and
// where the server's memory runs short, it turns away and ends the calls of the
// client that has the most of them waiting, the youngest first, so that the
// others are served.
//
// It knows neither messages nor identities: what an identity may is creds', what
// a message may have in it is elan/rpc's. The limits of HTTP/2 itself, which gRPC
// holds, are set in elan/rpc.NewServer. The mains that serve clients use it:
//
//	g, err := gate.New(gate.Options{Prefix: "elan", Registerer: registry})
//	s, health := rpc.NewServer(append(g.ServerOptions(), opts...)...)
//	rpc.Register(g.Registrar(s), options)
//	go g.Run(ctx)
//	rpc.Serve(ctx, s, rpc.ServeOptions{Listener: g.Listener(l)})
package gate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"regexp"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

const (
	// Ping is how long nothing comes from a client before it is asked whether it is
	// still there.
	Ping = 60 * time.Second
	// PingTimeout is how long it has for the answer.
	PingTimeout = 20 * time.Second

	// defaultIdle is longer than a lunch, and than builds are apart in which clients
	// keep their connections with pings.
	defaultIdle = 4 * time.Hour
	// defaultGrace is how long actions may run by default.
	defaultGrace = 24 * time.Hour
	// defaultStall is longer than what clients give a call, Bazel a minute, and what
	// networks need to say that they are gone.
	defaultStall = 5 * time.Minute
	// lendTicks is how long a call that has a place may wait for its client until
	// another one has the place.
	lendTicks = 5
	// tick is how often calls are looked at that wait for their clients.
	tick = time.Second
)

var prefixPattern = regexp.MustCompile(`^[a-z][a-z0-9_]*[a-z0-9]$`)

// Options are those of New. The zero Options, with a Prefix, are valid.
type Options struct {
	// Prefix begins the metrics' names: "elan" gives elan_grpc_connections.
	Prefix string
	// MaxConnections bounds the connections. 0: three quarters of the files that the
	// process may have open, and at most 65,536.
	MaxConnections int
	// MaxConnectionsPerAddress bounds those from one address. 0: half of the
	// MaxConnections, since a proxy or a cluster's gateway is one address too.
	MaxConnectionsPerAddress int
	// Stall is how long a call may wait for its client to send something, or to take
	// something, before it ends with DEADLINE_EXCEEDED. 0: 5 minutes.
	Stall time.Duration
	// MaxIdle is how long a connection stays open that has no call. 0: 4 hours.
	MaxIdle time.Duration
	// MaxAge is how long a connection takes new calls, more or less a tenth: clients
	// make another one then, which a balancer may send elsewhere. 0: for ever.
	MaxAge time.Duration
	// AgeGrace is how long the calls of such a connection may still take. 0: 24 hours.
	AgeGrace time.Duration
	// MaxMemoryBytes is what may be in use on the heap before calls are ended for it.
	// 0: three quarters of what the machine or the process's control group has, or
	// GOMEMLIMIT, where that is less.
	MaxMemoryBytes int64
	// Kinds says which methods, by their full names, are more than Small. nil: those
	// of the Remote Execution API.
	Kinds map[string]Kind
	// Admit says whether a call with these headers may come in at all; its error is a
	// status. It runs in the goroutine that reads the connection, and so waits for nobody.
	// nil: each may.
	Admit func(ctx context.Context, method string) error
	// Logger takes, at level warn, which clients are turned away. nil: nobody.
	Logger *slog.Logger
	// Registerer takes the metrics. nil: they are counted for nobody.
	Registerer prometheus.Registerer
}

func (o Options) withDefaults() (Options, error) {
	if !prefixPattern.MatchString(o.Prefix) {
		return o, fmt.Errorf("gate: prefix %q does not match %v", o.Prefix, prefixPattern)
	}
	if o.MaxConnections < 0 || o.MaxConnectionsPerAddress < 0 || o.Stall < 0 || o.MaxIdle < 0 || o.MaxAge < 0 || o.AgeGrace < 0 || o.MaxMemoryBytes < 0 {
		return o, errors.New("gate: negative limit")
	}
	o.MaxConnections = cmp.Or(o.MaxConnections, fileLimit()*3/4)
	o.MaxConnectionsPerAddress = cmp.Or(o.MaxConnectionsPerAddress, max(1, o.MaxConnections/2))
	o.Stall = cmp.Or(o.Stall, defaultStall)
	o.MaxIdle = cmp.Or(o.MaxIdle, defaultIdle)
	o.AgeGrace = cmp.Or(o.AgeGrace, defaultGrace)
	o.MaxMemoryBytes = cmp.Or(o.MaxMemoryBytes, defaultMemory())
	if o.Kinds == nil {
		o.Kinds = kinds()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// Gate is in front of one server. It is safe for concurrent use.
type Gate struct {
	o       Options
	log     *slog.Logger
	metrics *metrics
	methods map[string]Kind // that are served; not changed once it serves
	// weigh is what is alive on the heap, in bytes, as far as that matters to the limit,
	// and whether that was found out since the last time.
	weigh func(limit int64) (live int64, fresh bool)

	calls  atomic.Int64 // that are going on
	ticks  atomic.Int64 // counted by Run, from 1 on
	short  atomic.Bool  // memory is short
	share  atomic.Int64 // of the calls, which a connection may have; less than unlimited then, and for a while after
	others *conn        // stands for the connections that have no TCP address

	// mu guards what follows. Nothing is waited for under it.
	mu      sync.RWMutex
	open    map[*conn]struct{}
	conns   map[ends]*conn // the youngest one of those ends
	clients map[netip.Addr]*client
	refused refusals
}

// ends are the addresses of a connection. A client may have the same port for
// connections to several addresses of the server.
type ends struct{ client, server netip.AddrPort }

// endsOf are those of a TCP connection.
func endsOf(client, server net.Addr) (ends, bool) {
	c, ok := client.(*net.TCPAddr)
	if !ok {
		return ends{}, false
	}
	e := ends{client: c.AddrPort()}
	if s, ok := server.(*net.TCPAddr); ok {
		e.server = s.AddrPort()
	}
	return e, true
}

// client is all connections from one address.
type client struct {
	conns int // guarded by Gate.mu
}

// New checks the options, and registers the metrics.
func New(o Options) (*Gate, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	g := &Gate{
		o: o, log: o.Logger, methods: map[string]Kind{}, weigh: newMemory().weigh,
		open: map[*conn]struct{}{}, conns: map[ends]*conn{}, clients: map[netip.Addr]*client{},
	}
	g.others = newConn(g, &client{})
	g.ticks.Store(1)
	g.share.Store(unlimited)
	g.metrics, err = newMetrics(o, g)
	return g, err
}

// ServerOptions are for the server that is behind g.
func (g *Gate) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.InTapHandle(g.tap),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: Ping, Timeout: PingTimeout,
			MaxConnectionIdle: g.o.MaxIdle, MaxConnectionAge: g.o.MaxAge, MaxConnectionAgeGrace: g.o.AgeGrace,
		}),
	}
}

// Run ends calls that are stuck, and relieves the memory, until ctx is done. Until
// then MaxMemoryBytes is also the limit that the garbage collector works towards,
// unless GOMEMLIMIT gives one.
func (g *Gate) Run(ctx context.Context) error {
	if limit := debug.SetMemoryLimit(-1); limit == math.MaxInt64 {
		debug.SetMemoryLimit(g.o.MaxMemoryBytes)
		defer debug.SetMemoryLimit(limit)
	}
	look := time.NewTicker(tick)
	defer look.Stop()
	weigh := time.NewTicker(weighEvery)
	defer weigh.Stop()
	for {
		select {
		case <-look.C:
			g.endStalled(g.ticks.Add(1))
			g.regain()
		case <-weigh.C:
			if g.calls.Load() > 0 || g.short.Load() {
				g.relieve()
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// endStalled ends the calls that wait for their clients since before the limit,
// forgets those that have ended by themselves, and closes the connections that
// take nothing of what calls were answered: of these gRPC lets go in no other way.
// One that has other calls, which go on, is left alone, since it may be that of an
// API server or a proxy, one of whose clients sleeps; if memory is short it is closed.
func (g *Gate) endStalled(now int64) {
	limit := now - int64(g.o.Stall/tick) - 1 // a tick has begun already
	for _, c := range g.connections() {
		stalled, others := c.stalled(limit, now-lendTicks-1)
		for _, call := range stalled {
			g.metrics.stalled.Inc()
			call.cancel(errStalled)
		}
		if bytes, since := c.unsent.stuck(); bytes > 0 && since <= limit && !others {
			c.shut(g.metrics.stuck)
		}
	}
}

// connections are those that there are.
func (g *Gate) connections() []*conn {
	g.mu.RLock()
	defer g.mu.RUnlock()
	all := make([]*conn, 0, len(g.open)+1)
	for c := range g.open {
		all = append(all, c)
	}
	return append(all, g.others)
}
