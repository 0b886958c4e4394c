package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/instances"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/elan/gate"
	"github.com/mettle-build/mettle/elan/inventory"
	"github.com/mettle-build/mettle/elan/logstream"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/metrics"
	"github.com/mettle-build/mettle/metrics/tracing"
	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/image"
	"github.com/mettle-build/mettle/mettle/worker/livelog"
)

// dualCmd is a complete server in one process. Its flags are those of the parts.
type dualCmd struct {
	Host     string `help:"The address to listen on. Without --policy, anyone who reaches it can run commands here." default:"127.0.0.1"`
	Port     int    `help:"The port for clients (gRPC)." default:"7778"`
	Admin    bool   `help:"Let whoever reaches the server list, remove and verify what is in the store (elan ls, rm, ...), and list operations, even if it listens on other than loopback."`
	HTTPPort int    `name:"http_port" help:"The port for metrics, health and profiles (HTTP); 0 is any free one, -1 none." default:"7779"`

	Dir         string        `help:"The directory for everything that is kept. Default: mettle in the user's cache directory, /var/cache/mettle for root." type:"path"`
	MaxSize     flags.Size    `help:"How much the store may hold, as in 100GB. 0: as much as the disk has room for." default:"0"`
	MinFree     flags.Size    `help:"How much of the disk is left to others. 0: a twentieth of it, at most 2GiB." default:"0"`
	MinLifetime time.Duration `help:"How long what was read, written or found stays at least." default:"3h"`
	ScrubRate   flags.Size    `help:"How many bytes a second of the store are read in the background to find what the disk damaged. 0: none." default:"20MiB"`

	flags.Serving
	flags.Assets
	flags.Trust
	flags.Connections

	slotFlags
	imageFlags
	executeFlags
	Traces flags.Tracing `embed:""`
}

// Validate is called by kong, before Run.
func (c *dualCmd) Validate() error {
	return errors.Join(c.slotFlags.check(), c.imageFlags.check(), c.executeFlags.check(), c.Serving.Check(rpc.MaxBatch), c.Trust.Check(), c.Connections.Check(), c.Traces.Check())
}

// Run serves until ctx is done and everything has been brought to an end.
func (c *dualCmd) Run(ctx context.Context, out io.Writer, log *slog.Logger) error {
	defer ballast()()
	dir, err := c.directory()
	if err != nil {
		return err
	}
	// Ports first: a port in use is the commonest mistake, and costs nothing to find.
	listener, err := flags.Listen(ctx, c.Host, c.Port, "--port")
	if err != nil {
		return err
	}
	d := &dual{cmd: c, dir: dir, listener: listener, log: log, registry: metrics.NewRegistry()}
	d.admin = adminPage{name: "mettle dual", registry: d.registry, log: log}
	if err := d.wire(ctx); err != nil {
		d.admin.close()
		return errors.Join(err, listener.Close(), d.close())
	}
	d.announce(out)
	return errors.Join(d.serve(ctx), d.close())
}

// directory is where everything is kept. For root it is not below /root, which
// the users that actions run as can't enter.
func (c *dualCmd) directory() (string, error) {
	if c.Dir != "" {
		return filepath.Abs(c.Dir)
	}
	return flags.CacheDir("mettle", "--dir")
}

// makeDir makes the directory for everything, if need be. Where root runs this,
// actions run as other users, who must be able to pass through it; they can
// neither list it nor enter the store in it.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil { //nolint:gosec // the store and the work below have modes of their own
		return err
	}
	if os.Geteuid() != 0 {
		return nil
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	return os.Chmod(dir, info.Mode().Perm()|0o111)
}

// dual is the parts of a running dualCmd.
type dual struct {
	cmd      *dualCmd
	dir      string
	listener net.Listener
	log      *slog.Logger
	registry *prometheus.Registry

	admin   adminPage
	storage *file.Store
	blobs   *chunked.Local // what is in storage, for everybody
	// stores gives the blobs of an instance; nil where all have the same.
	stores   func(instance string) blob.Store
	actions  *action.Cache
	failures *action.Failures
	assets   *asset.Service // nil where they are not served
	logs     *logstream.Streams
	jobs     *mem.Queue
	api      *api.Server
	images   *image.Cache // nil: actions run in none
	worker   *worker.Worker
	guard    *flags.Guarded
	gate     *gate.Gate
	tracer   *tracing.Tracer

	closeTracer func() error
}

// wire makes the parts, in the order in which they need each other.
func (d *dual) wire(ctx context.Context) (err error) {
	c := d.cmd
	if err := d.admin.listen(ctx, c.Host, c.HTTPPort); err != nil {
		return err
	}
	if d.tracer, d.closeTracer, err = d.admin.tracer(ctx, c.Traces, hostname()); err != nil {
		return err
	}
	if d.guard, err = c.Guard(flags.GuardOptions{
		Addr: d.listener.Addr(), OperationInstance: operationInstance, Logger: d.log, Registerer: d.registry,
	}); err != nil {
		return err
	}
	if d.gate, err = c.Gate("mettle", d.guard, d.log, d.registry); err != nil {
		return err
	}
	if err := makeDir(d.dir); err != nil {
		return err
	}
	// The store that has files for inputs, and no other: the libraries of
	// buckets would be in every slot's helper too.
	d.storage, err = file.New(file.Options{
		Dir:          filepath.Join(d.dir, "store"),
		MaxBytes:     int64(c.MaxSize),
		MinFreeBytes: int64(c.MinFree),
		MinLifetime:  c.MinLifetime,
		// 0 is the default there.
		ScrubBytesPerSecond: cmp.Or(int64(c.ScrubRate), -1),
		Logger:              d.log,
		Registerer:          d.registry,
	})
	if err != nil {
		return err
	}
	d.blobs, err = chunked.NewLocal(d.storage, chunked.Options{Entries: d.storage, Logger: d.log, Registerer: d.registry})
	if err != nil {
		return err
	}
	if c.IsolateInstances {
		apart, err := instances.New(ctx, d.blobs)
		if err != nil {
			return fmt.Errorf("--isolate_instances: %w", err)
		}
		d.stores = apart.Of
	}
	if d.failures, err = action.NewFailures(action.FailuresOptions{Entries: d.blobs}); err != nil {
		return err
	}
	if d.actions, err = action.New(action.Options{Store: d.blobs, Stores: d.stores, Entries: d.blobs, Logger: d.log, Registerer: d.registry}); err != nil {
		return err
	}
	if c.Served(d.listener.Addr()) {
		if d.assets, err = asset.New(asset.Options{
			Store: d.blobs, Stores: d.stores, Entries: d.blobs, MinLifetime: c.MinLifetime, Dir: filepath.Join(d.dir, "assets"),
			MaxBytes: int64(c.AssetMaxSize), Timeout: c.AssetTimeout, AllowPrivate: c.AssetAllowPrivate,
			Logger: d.log, Registerer: d.registry,
		}); err != nil {
			return err
		}
	}
	if d.jobs, err = mem.New(mem.Options{Logger: d.log}); err != nil {
		return err
	}
	properties, err := c.properties()
	if err != nil {
		return err
	}
	if d.images, err = c.openImages(imageOptions{dir: imagesIn(d.dir), sandbox: c.Sandbox, log: d.log, registry: d.registry}); err != nil {
		return err
	}
	if err := d.wireWorker(slices.Concat(platform.Host(), withImages(properties, d.images))); err != nil {
		return err
	}
	return d.wireAPI()
}

func (d *dual) wireAPI() error {
	c := d.cmd
	platforms, err := platform.New(platform.Options{
		Pools: []platform.Pool{{Name: queue.DefaultPool, Properties: d.worker.Properties()}}, Logger: d.log,
	})
	if err != nil {
		return err
	}
	if d.api, err = api.New(api.Options{
		ID:             hostname(),
		Store:          d.blobs,
		Stores:         d.stores,
		Actions:        d.actions,
		Jobs:           d.jobs,
		Updates:        d.jobs,
		Notices:        d.jobs,
		List:           c.Admin || d.guard.Enforced() || loopback(d.listener.Addr()),
		Platforms:      platforms,
		DefaultTimeout: c.DefaultTimeout,
		MaxTimeout:     c.MaxTimeout,
		AbandonAfter:   c.AbandonAfter,
		Logger:         d.log,
		Registerer:     d.registry,
	}); err != nil {
		return err
	}
	d.admin.api = d.api
	return nil
}

func (d *dual) wireWorker(properties []platform.Property) (err error) {
	c := d.cmd
	if c.LogMemory > 0 {
		if d.logs, err = logstream.New(logstream.Options{MaxBytes: int64(c.LogMemory), Registerer: d.registry}); err != nil {
			return err
		}
	}
	d.worker, err = worker.New(c.options(worker.Options{
		LogStreams:     d.liveLogs(),
		Jobs:           d.jobs,
		Updates:        d.jobs,
		Store:          d.blobs,
		Stores:         d.stores,
		Actions:        d.actions,
		Failures:       d.failures,
		Dir:            filepath.Join(d.dir, "work"),
		Images:         d.images,
		Name:           hostname(),
		Notices:        d.jobs,
		Properties:     properties,
		DefaultTimeout: c.DefaultTimeout,
		MaxTimeout:     c.MaxTimeout,
		// Less than what the store leaves free, so that a full store stops nothing.
		MinFreeDiskBytes: int64(c.MinFree) / 4,
		Hide:             append(secretFiles(slices.Concat(d.guard.Files(), c.Traces.Secrets(), []string{c.TLSKey, c.Policy, c.AuditLog, c.ImageAuth})...), d.dir),
		Addr:             c.Address(d.listener.Addr()),
		Trace:            traceAttempts(d.tracer),
		Logger:           d.log,
		Registerer:       d.registry,
	}))
	return err
}

// loopback reports whether only this machine can reach addr.
func loopback(addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}

// announce prints what the user puts into a configuration.
func (d *dual) announce(out io.Writer) {
	addr := flags.Reachable(d.listener.Addr())
	fmt.Fprintf(out, `Mettle %s executes and stores, with %d slots and %s. Actions are %s.
  Bazel   build --remote_executor=%s://%s    (in .bazelrc)
  Please  [remote]
          url = %s
`, version, d.worker.Slots(), d.dir, isolated(d.worker), d.cmd.Scheme(), addr, addr)
	d.admin.announce(out)
}

// serve runs the parts until ctx is done, and then ends them in the order in
// which nobody waits for what is gone: no new jobs are taken, running actions
// end and their clients hear of it, streams of queued ones are cut (a client
// resumes them with WaitExecution, here or after a restart), calls end, and
// last the parts that served them.
func (d *dual) serve(ctx context.Context) error {
	// parts outlive ctx: they are needed until the drain is over.
	parts, stopParts := context.WithCancel(context.WithoutCancel(ctx))
	defer stopParts()
	group, groupCtx := errgroup.WithContext(parts)
	group.Go(func() error { return d.api.Run(groupCtx) })
	group.Go(func() error { return d.guard.Run(groupCtx) })
	group.Go(func() error { return d.gate.Run(groupCtx) })
	group.Go(func() error { return d.admin.serve(groupCtx, d.ready, d.notes) })
	working, stopWork := context.WithCancel(groupCtx)
	worked := make(chan struct{})
	group.Go(func() error {
		defer close(worked)
		return d.worker.Run(working)
	})
	group.Go(func() error {
		defer stopParts()
		defer stopWork()
		serving, stopServing := context.WithCancel(ctx)
		defer stopServing()
		context.AfterFunc(groupCtx, stopServing)
		return d.serveRPC(serving, func() {
			drain{worker: d.worker, stop: stopWork, ended: worked, timeout: d.cmd.DrainTimeout, log: d.log}.wait()
			d.sync()
			d.api.Shutdown()
			d.endLogs()
		})
	})
	return group.Wait()
}

// liveLogs are logs for the worker.
func (d *dual) liveLogs() livelog.Streams {
	if d.logs == nil {
		return nil
	}
	return d.logs
}

// endLogs sends those away who would wait for what is printed next.
func (d *dual) endLogs() {
	if d.logs != nil {
		d.logs.Shutdown()
	}
}

// sync writes to the disk what the store has yet to write, while clients can
// still fetch outputs, so that the time in which nobody answers is short.
func (d *dual) sync() {
	if err := d.storage.Sync(); err != nil {
		d.log.Error("writing the store to the disk", "error", err)
	}
}

// closeGrace is how long calls may take to end once nothing is left to wait for.
const closeGrace = 5 * time.Second

func (d *dual) serveRPC(ctx context.Context, drain func()) error {
	observed, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "mettle", Registerer: d.registry, Logger: d.log})
	if err != nil {
		return err
	}
	server, health := rpc.NewServer(slices.Concat(d.gate.ServerOptions(), d.tracer.ServerOptions(), observed.ServerOptions(), d.guard.ServerOptions)...)
	gated := d.gate.Registrar(server)
	options := rpc.Options{
		Store:         d.blobs,
		Stores:        d.stores,
		Actions:       d.actions,
		Updates:       d.cmd.ACUpdate,
		Caller:        d.guard.Caller,
		Failures:      d.failures,
		LogStreams:    d.logs,
		Execution:     d.api.Capabilities(),
		MaxBatchBytes: int64(d.cmd.MaxBatchSize),
		MaxBlobBytes:  int64(d.cmd.MaxBlobSize),
		Logger:        d.log,
		Registerer:    d.registry,
	}
	if d.assets != nil {
		options.Assets = d.assets
	}
	if err := rpc.Register(gated, options); err != nil {
		return err
	}
	inv, err := inventory.NewLocal(inventory.Options{Store: d.blobs, Entries: d.blobs})
	if err != nil {
		return err
	}
	rpc.RegisterAdmin(gated, rpc.AdminOptions{Inventory: inv, Addr: d.listener.Addr(), Anywhere: d.cmd.Admin || d.guard.Enforced()})
	d.api.Register(gated)
	return rpc.Serve(ctx, server, rpc.ServeOptions{Listener: d.gate.Listener(d.listener), Health: health, Drain: drain, Grace: closeGrace})
}

// ready tells whether the worker takes jobs.
func (d *dual) ready(context.Context) error { return d.worker.Ready() }

// notes are what operators should know though the worker takes jobs.
func (d *dual) notes() []string {
	notes := d.worker.Notes()
	if err := d.storage.Full(); err != nil {
		notes = append(notes, "writes are refused: "+err.Error())
	}
	return notes
}

// close frees what wire made, the last first. Parts that were not made are nil.
func (d *dual) close() error {
	var errs []error
	if d.worker != nil {
		errs = append(errs, d.worker.Close())
	}
	if d.images != nil {
		errs = append(errs, d.images.Close())
	}
	if d.assets != nil {
		errs = append(errs, d.assets.Close())
	}
	d.endLogs()
	if d.jobs != nil {
		errs = append(errs, d.jobs.Close())
	}
	if d.storage != nil {
		errs = append(errs, d.storage.Close())
	}
	if d.guard != nil {
		errs = append(errs, d.guard.Close())
	}
	if d.closeTracer != nil {
		errs = append(errs, d.closeTracer())
	}
	return errors.Join(errs...)
}
