package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/instances"
	"github.com/mettle-build/mettle/elan/blob/open"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/elan/gate"
	"github.com/mettle-build/mettle/elan/inventory"
	"github.com/mettle-build/mettle/elan/logstream"
	"github.com/mettle-build/mettle/elan/overview"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/metrics"
	"github.com/mettle-build/mettle/metrics/tracing"
)

// closeGrace is how long calls may take to end after SIGTERM.
const closeGrace = 30 * time.Second

// serveCmd serves a store.
type serveCmd struct {
	Storage     []string      `help:"Where blobs are kept: file:///DIRECTORY, mem://, gs://BUCKET/PREFIX or s3://BUCKET/PREFIX. Several, by commas or by this flag again, are tiers: copies of what is used in the first ones, and everything in the last. Options go behind the URL, as in mem://?max_size=1GB. Default: elan in the user's cache directory, /var/cache/elan for root." placeholder:"URL"`
	MaxSize     flags.Size    `help:"How much the store may hold, as in 100GB. 0: as much as the disk has room for; in memory, the store's own default. Several stores have it in their URLs." default:"0"`
	MinFree     flags.Size    `help:"How much of the disk is left to others. 0: a twentieth of it, at most 2GiB." default:"0"`
	MinLifetime time.Duration `help:"How long what was read, written or found stays at least." default:"3h"`
	ScrubRate   flags.Size    `help:"How many bytes a second of a directory are read in the background to find what the disk damaged. 0: none." default:"20MiB"`

	flags.Serving
	flags.Trust
	flags.Connections
	flags.Ending

	Host     string `help:"The address to listen on. Without --policy, anyone who reaches it can read and write." default:"127.0.0.1"`
	Port     int    `help:"The port for clients (gRPC)." default:"7777"`
	Admin    bool   `help:"Let whoever reaches the server list, remove and verify what is in the store (elan ls, rm, ...) even if it listens on other than loopback."`
	HTTPPort int    `name:"http_port" help:"The port for metrics, health and profiles (HTTP); 0 is any free one, -1 none." default:"7780"`

	flags.Assets

	Traces flags.Tracing `embed:""`
}

// Validate is called by kong, before Run.
func (c *serveCmd) Validate() error {
	return errors.Join(c.Serving.Check(rpc.MaxBatch), c.Trust.Check(), c.Connections.Check(), c.Ending.Check(), c.Traces.Check())
}

// Run serves until ctx is done.
func (c *serveCmd) Run(ctx context.Context, out io.Writer, log *slog.Logger) (err error) {
	urls, err := c.storageURLs()
	if err != nil {
		return err
	}
	// Ports first: a port in use is the commonest mistake, and costs nothing to find.
	listener, err := flags.Listen(ctx, c.Host, c.Port, "--port")
	if err != nil {
		return err
	}
	defer listener.Close() //nolint:errcheck // closed already where it served
	var adminListener net.Listener
	if c.HTTPPort >= 0 {
		if adminListener, err = flags.Listen(ctx, c.Host, c.HTTPPort, "--http_port"); err != nil {
			return err
		}
		defer adminListener.Close() //nolint:errcheck // as above
	}
	registry := metrics.NewRegistry()
	storage, err := open.Open(ctx, open.Options{
		MaxBytes:     int64(c.MaxSize),
		MinFreeBytes: int64(c.MinFree),
		MinLifetime:  c.MinLifetime,
		ScrubRate:    int64(c.ScrubRate),
		Logger:       log,
		Registerer:   registry,
	}, urls...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, storage.Close()) }()
	s := &server{cmd: c, log: log, registry: registry, storage: storage}
	// After all that it traces, and also where ctx has ended.
	defer func() { err = errors.Join(err, s.tracer.Close(context.WithoutCancel(ctx))) }()
	if err := s.wire(ctx, listener.Addr()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	fmt.Fprintf(out, "Elan %s stores in %s.\n  Bazel   build --remote_cache=%s://%s    (in .bazelrc)\n", version, strings.Join(urls, ", "), c.Scheme(), flags.Reachable(listener.Addr()))
	if adminListener != nil {
		fmt.Fprintf(out, "  Metrics, health and profiles: http://%s/\n", flags.Reachable(adminListener.Addr()))
	}
	return s.serve(ctx, listener, adminListener)
}

// server is the parts of a running serveCmd.
type server struct {
	cmd      *serveCmd
	log      *slog.Logger
	registry *prometheus.Registry
	storage  open.Storage

	blobs  *chunked.Store
	assets *asset.Service // nil where they are not served
	logs   *logstream.Streams
	grpc   *grpc.Server
	health *health.Server
	admin  *metrics.Server
	guard  *flags.Guarded
	gate   *gate.Gate
	tracer *tracing.Tracer
	ending atomic.Bool // it was told to end
}

// wire makes the parts, for a server at addr, in the order in which they need
// each other.
func (s *server) wire(ctx context.Context, addr net.Addr) (err error) {
	c := s.cmd
	if s.tracer, err = c.Traces.Tracer(ctx, flags.TracerOptions{
		Service: "elan", Version: version, Prefix: "elan", Registerer: s.registry, Logger: s.log,
	}); err != nil {
		return err
	}
	if s.blobs, err = chunked.New(chunked.Options{Store: s.storage, Entries: s.storage, Logger: s.log, Registerer: s.registry}); err != nil {
		return err
	}
	if c.LogMemory > 0 {
		if s.logs, err = logstream.New(logstream.Options{MaxBytes: int64(c.LogMemory), Registerer: s.registry}); err != nil {
			return err
		}
	}
	options, err := s.options(ctx)
	if err != nil {
		return err
	}
	inv, err := inventory.NewLocal(inventory.Options{Store: s.blobs, Entries: s.blobs})
	if err != nil {
		return err
	}
	observed, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "elan", Registerer: s.registry, Logger: s.log})
	if err != nil {
		return err
	}
	if err := s.wireAdmin(); err != nil {
		return err
	}
	if s.guard, err = c.Guard(flags.GuardOptions{Addr: addr, Logger: s.log, Registerer: s.registry}); err != nil {
		return err
	}
	options.Caller = s.guard.Caller
	if s.gate, err = c.Gate("elan", s.guard, s.log, s.registry); err != nil {
		return err
	}
	// Last, since it is the one part that is to be closed.
	if c.Served(addr) {
		if s.assets, err = asset.New(asset.Options{
			Store: s.blobs, Stores: options.Stores, Entries: s.blobs, MinLifetime: c.MinLifetime,
			MaxBytes: int64(c.AssetMaxSize), Timeout: c.AssetTimeout, AllowPrivate: c.AssetAllowPrivate,
			Logger: s.log, Registerer: s.registry,
		}); err != nil {
			return errors.Join(err, s.close())
		}
		options.Assets = s.assets
	}
	s.grpc, s.health = rpc.NewServer(slices.Concat(s.gate.ServerOptions(), s.tracer.ServerOptions(), observed.ServerOptions(), s.guard.ServerOptions)...)
	if err := rpc.Register(s.gate.Registrar(s.grpc), options); err != nil {
		return errors.Join(err, s.close())
	}
	rpc.RegisterAdmin(s.gate.Registrar(s.grpc), rpc.AdminOptions{Inventory: inv, Addr: addr, Anywhere: c.Admin || s.guard.Enforced()})
	return nil
}

// wireAdmin makes the HTTP server, whether it will have a port or not.
func (s *server) wireAdmin() error {
	figures, err := overview.New(overview.Options{Gatherer: s.registry})
	if err != nil {
		return err
	}
	s.admin, err = metrics.New(metrics.Options{
		Name: "elan", Version: version, Registry: s.registry, Ready: s.ready, Notes: notes(s.storage), Pages: figures.Pages(), Tables: figures.Tables, Logger: s.log,
	})
	return err
}

// serve serves until ctx is done; admin may be nil.
func (s *server) serve(ctx context.Context, listener, admin net.Listener) error {
	// parts outlive ctx: they are needed until the last call has ended.
	parts, stopParts := context.WithCancel(context.WithoutCancel(ctx))
	defer stopParts()
	group, groupCtx := errgroup.WithContext(parts)
	if admin != nil {
		group.Go(func() error { return s.admin.Serve(groupCtx, admin) })
	}
	group.Go(func() error { return s.guard.Run(groupCtx) })
	group.Go(func() error { return s.gate.Run(groupCtx) })
	group.Go(func() error {
		defer stopParts()
		serving, stopServing := context.WithCancel(ctx)
		defer stopServing()
		context.AfterFunc(serving, func() { s.ending.Store(true) })
		context.AfterFunc(groupCtx, stopServing)
		return rpc.Serve(serving, s.grpc, rpc.ServeOptions{
			Listener: s.gate.Listener(listener), Health: s.health, Delay: s.cmd.ShutdownDelay, Drain: s.endLogs, Grace: closeGrace,
		})
	})
	return group.Wait()
}

// ready is what /readyz says: that clients may come, until it ends.
func (s *server) ready(context.Context) error {
	if s.ending.Load() {
		return errors.New("shutting down")
	}
	return nil
}

// close ends what wire began.
func (s *server) close() error {
	s.endLogs()
	err := s.guard.Close()
	if s.assets != nil {
		err = errors.Join(err, s.assets.Close())
	}
	return err
}

// endLogs sends those away who would wait for what is printed next.
func (s *server) endLogs() {
	if s.logs != nil {
		s.logs.Shutdown()
	}
}

// notes are what operators should know though the server is ready: a store that
// is full still serves what it has.
func notes(s blob.Store) func() []string {
	return func() []string {
		if f, ok := blob.As[blob.Fuller](s); ok {
			if err := f.Full(); err != nil {
				return []string{"writes are refused: " + err.Error()}
			}
		}
		return nil
	}
}

// options are those of the services, but the assets.
func (s *server) options(ctx context.Context) (rpc.Options, error) {
	c := s.cmd
	stores, err := c.stores(ctx, s.blobs)
	if err != nil {
		return rpc.Options{}, err
	}
	actions, err := action.New(action.Options{Store: s.blobs, Stores: stores, Entries: s.blobs, Logger: s.log, Registerer: s.registry})
	if err != nil {
		return rpc.Options{}, err
	}
	failures, err := action.NewFailures(action.FailuresOptions{Entries: s.blobs})
	if err != nil {
		return rpc.Options{}, err
	}
	return rpc.Options{
		Store:         s.blobs,
		Stores:        stores,
		Actions:       actions,
		Updates:       c.ACUpdate,
		Failures:      failures,
		LogStreams:    s.logs,
		MaxBatchBytes: int64(c.MaxBatchSize),
		MaxBlobBytes:  int64(c.MaxBlobSize),
		Logger:        s.log,
		Registerer:    s.registry,
	}, nil
}

// stores gives the blobs of an instance; nil where all have the same.
func (c *serveCmd) stores(ctx context.Context, storage blob.Store) (func(instance string) blob.Store, error) {
	if !c.IsolateInstances {
		return nil, nil
	}
	s, err := instances.New(ctx, storage)
	if err != nil {
		return nil, fmt.Errorf("--isolate_instances: %w", err)
	}
	return s.Of, nil
}

// storageURLs are those of the stores, the last of which has everything.
func (c *serveCmd) storageURLs() ([]string, error) {
	if len(c.Storage) > 0 {
		return c.Storage, nil
	}
	dir, err := flags.CacheDir("elan", "--storage")
	return []string{"file://" + dir}, err
}
