package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/elan/gate"
	"github.com/mettle-build/mettle/elan/relay"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/metrics"
	"github.com/mettle-build/mettle/metrics/tracing"
	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/queue"
)

// apiCmd is one of a fleet's API servers, of which there may be any number
// behind one address.
type apiCmd struct {
	Host     string `help:"The address to listen on. Without --policy, anyone who reaches it can run commands on the workers." default:"127.0.0.1"`
	Port     int    `help:"The port for clients (gRPC)." default:"7778"`
	Admin    bool   `help:"Let whoever reaches the server list operations, even if it listens on other than loopback."`
	HTTPPort int    `name:"http_port" help:"The port for metrics, health and profiles (HTTP); 0 is any free one, -1 none." default:"7779"`

	queueFlags
	storageFlags
	executeFlags
	poolFlags
	flags.Trust
	flags.Connections
	flags.Ending
	Traces flags.Tracing `embed:""`
}

// Validate is called by kong, before Run.
func (c *apiCmd) Validate() error {
	return errors.Join(c.queueFlags.check(), c.storageFlags.check(), c.executeFlags.check(), c.poolFlags.check(), c.Trust.Check(), c.Connections.Check(), c.Ending.Check(), c.Traces.Check())
}

// Run serves until ctx is done.
func (c *apiCmd) Run(ctx context.Context, out io.Writer, log *slog.Logger) error {
	defer ballast()()
	// Ports first: a port in use is the commonest mistake, and costs nothing to find.
	listener, err := flags.Listen(ctx, c.Host, c.Port, "--port")
	if err != nil {
		return err
	}
	s := &apiServer{cmd: c, listener: listener, log: log, registry: metrics.NewRegistry()}
	s.admin = adminPage{name: "mettle api", storesOnly: true, registry: s.registry, log: log}
	if err := s.wire(ctx); err != nil {
		s.admin.close()
		return errors.Join(err, listener.Close(), s.closers.close())
	}
	s.announce(out)
	return errors.Join(s.serve(ctx), s.closers.close())
}

// apiServer is the parts of a running apiCmd.
type apiServer struct {
	cmd      *apiCmd
	listener net.Listener
	log      *slog.Logger
	registry *prometheus.Registry

	admin   adminPage
	storage *remoteStorage
	conns   []*grpc.ClientConn // of relay
	relay   *relay.Relay
	jobs    queue.Broker
	api     *api.Server
	needs   needs
	guard   *flags.Guarded
	gate    *gate.Gate
	tracer  *tracing.Tracer
	closers closers
}

// wire makes the parts, in the order in which they need each other.
func (s *apiServer) wire(ctx context.Context) (err error) {
	c := s.cmd
	if err := s.admin.listen(ctx, c.Host, c.HTTPPort); err != nil {
		return err
	}
	id := uniqueName()
	tracer, closeTracer, err := s.admin.tracer(ctx, c.Traces, id)
	if err != nil {
		return err
	}
	s.tracer = tracer
	s.closers.add(closeTracer)
	if s.guard, err = c.Guard(flags.GuardOptions{
		Addr: s.listener.Addr(), OperationInstance: operationInstance, Logger: s.log, Registerer: s.registry,
	}); err != nil {
		return err
	}
	s.closers.add(s.guard.Close)
	if s.gate, err = c.Gate("mettle", s.guard, s.log, s.registry); err != nil {
		return err
	}
	if s.jobs, err = c.queueFlags.open(ctx, queueOptions{log: s.log, registry: s.registry}); err != nil {
		return err
	}
	s.closers.add(s.jobs.Close)
	if err := s.wireStorage(); err != nil {
		return err
	}
	s.needs = needs{{"queue " + c.url.String(), s.jobs.Ready}, {"storage " + c.Storage, s.storage.ready}}
	platforms, err := c.platforms(s.log)
	if err != nil {
		return err
	}
	if s.api, err = api.New(api.Options{
		ID:             id,
		Store:          s.storage.of(""),
		Stores:         s.storage.of,
		Actions:        s.storage.actions,
		Jobs:           s.jobs,
		Updates:        s.jobs,
		Notices:        s.jobs,
		List:           c.Admin || s.guard.Enforced() || loopback(s.listener.Addr()),
		Platforms:      platforms,
		DefaultTimeout: c.DefaultTimeout,
		MaxTimeout:     c.MaxTimeout,
		AbandonAfter:   c.AbandonAfter,
		Logger:         s.log,
		Registerer:     s.registry,
	}); err != nil {
		return err
	}
	s.admin.api = s.api
	s.relay, err = relay.New(relay.Options{
		Conns: s.conns, Execution: s.api.Capabilities(), MaxBatchBytes: rpc.MaxBatch, Logger: s.log, Registerer: s.registry,
		// An elan that listens on loopback fetches assets for everyone who reaches it.
		NoAssets:        c.here() && !loopback(s.listener.Addr()),
		PassCredentials: c.passCredentials(),
		Caller:          s.caller(),
		Patient:         gate.Patient,
	})
	return err
}

// caller names the client to the storage, where that is called in this server's name.
func (s *apiServer) caller() func(context.Context) string {
	if !s.cmd.ownName() {
		return nil
	}
	return s.guard.CallerText
}

// maxConns is how many connections clients' calls are spread over: one is as much
// as a CPU can handle.
const maxConns = 4

// wireStorage connects to the storage: for this server's own calls, and for what
// clients send.
func (s *apiServer) wireStorage() (err error) {
	headers := append(metrics.Headers(metrics.Passed).DialOptions(), s.tracer.DialOptions()...)
	if s.storage, err = s.cmd.storageFlags.open(s.log, s.registry, headers...); err != nil {
		return err
	}
	s.closers.add(s.storage.close)
	for range min(maxConns, runtime.NumCPU()) {
		conn, err := s.cmd.connect(append(relay.DialOptions(), headers...)...)
		if err != nil {
			return err
		}
		s.closers.add(conn.Close)
		s.conns = append(s.conns, conn)
	}
	return nil
}

// announce prints what the user puts into a configuration.
func (s *apiServer) announce(out io.Writer) {
	addr := flags.Reachable(s.listener.Addr())
	fmt.Fprintf(out, `Mettle %s takes actions for the workers of %s, with the storage of %s.
  Bazel   build --remote_executor=%s://%s    (in .bazelrc)
  Please  [remote]
          url = %s
`, version, s.cmd.url, s.cmd.Storage, s.cmd.Scheme(), addr, addr)
	s.admin.announce(out)
}

// serve serves until ctx is done, and then cuts the streams of what is queued or
// runs, upon which clients resume them at another API server.
func (s *apiServer) serve(ctx context.Context) error {
	// parts outlive ctx: they are needed until the last call has ended.
	parts, stopParts := context.WithCancel(context.WithoutCancel(ctx))
	defer stopParts()
	group, groupCtx := errgroup.WithContext(parts)
	group.Go(func() error { return s.api.Run(groupCtx) })
	group.Go(func() error { return s.guard.Run(groupCtx) })
	group.Go(func() error { return s.gate.Run(groupCtx) })
	group.Go(func() error { return s.admin.serve(groupCtx, readyDuring(ctx, s.needs.ready), nil) })
	group.Go(func() error { return s.needs.report(groupCtx, s.log) })
	group.Go(func() error {
		defer stopParts()
		serving, stopServing := context.WithCancel(ctx)
		defer stopServing()
		context.AfterFunc(groupCtx, stopServing)
		return s.serveRPC(serving)
	})
	return group.Wait()
}

// apiGrace is how long transfers may take to end after SIGTERM.
const apiGrace = 30 * time.Second

func (s *apiServer) serveRPC(ctx context.Context) error {
	observed, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "mettle", Registerer: s.registry, Logger: s.log})
	if err != nil {
		return err
	}
	server, health := rpc.NewServer(slices.Concat(s.gate.ServerOptions(), s.tracer.ServerOptions(), observed.ServerOptions(), s.guard.ServerOptions)...)
	gated := s.gate.Registrar(server)
	s.relay.Register(gated) //nolint:contextcheck // streams have contexts of their own
	s.api.Register(gated)
	return rpc.Serve(ctx, server, rpc.ServeOptions{
		Listener: s.gate.Listener(s.listener), Health: health, Delay: s.cmd.ShutdownDelay, Drain: s.shutdown, Grace: apiGrace,
	})
}

// shutdown sends those away who would wait for longer than this server can.
func (s *apiServer) shutdown() {
	s.api.Shutdown()
	s.relay.Shutdown()
}
