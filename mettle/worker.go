package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/metrics"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/worker"
)

// workerCmd is one of a fleet's workers.
type workerCmd struct {
	queueFlags
	storageFlags

	Pool string `help:"The pool whose jobs it takes: workers of one pool are alike." default:"default"`
	Name string `help:"The worker's name in results and messages, which no other has. Default: the host's, and something random."`
	slotFlags
	imageFlags

	Dir       string     `help:"The directory for inputs and for actions to run in, on a disk of its own at best. Default: mettle-worker in the user's cache directory, /var/cache/mettle-worker for root." type:"path"`
	CacheSize flags.Size `help:"How much of the storage's blobs are kept here, as in 100GB. 0: as much as the disk has room for." default:"0"`
	MinFree   flags.Size `help:"How much of the disk is left to others. 0: a twentieth of it, at most 2GiB." default:"0"`

	CompressFrom flags.Size `help:"From which size on inputs and outputs travel compressed, as zstd where the storage offers that, as in 4KiB. It takes CPU here and there, and is of use over a network that has less than some 100 MiB/s for this machine. 0: none do." default:"0"`

	Host     string `help:"The address to listen on." default:"127.0.0.1"`
	HTTPPort int    `name:"http_port" help:"The port for metrics, health and profiles (HTTP); 0 is any free one, -1 none." default:"7781"`

	Traces flags.Tracing `embed:""`
}

// Validate is called by kong, before Run.
func (c *workerCmd) Validate() error {
	err := errors.Join(c.queueFlags.check(), c.storageFlags.check(), c.slotFlags.check(), c.imageFlags.check(), c.Traces.Check())
	if c.Pool == "" {
		err = errors.Join(err, errors.New("--pool: it has no name"))
	}
	return err
}

// Run takes jobs until ctx is done and those that run have ended.
func (c *workerCmd) Run(ctx context.Context, out io.Writer, log *slog.Logger) error {
	defer ballast()()
	// From before the first signal on: two may come at once.
	second, stop := secondSignal()
	defer stop()
	w := &fleetWorker{cmd: c, log: log, registry: metrics.NewRegistry(), second: second}
	w.admin = adminPage{name: "mettle worker", storesOnly: true, registry: w.registry, log: log}
	if err := w.wire(ctx); err != nil {
		w.admin.close()
		return errors.Join(err, w.closers.close())
	}
	fmt.Fprintf(out, "Mettle %s runs the actions of pool %s from %s, with %d slots and %s, as worker %s. Actions are %s.\n",
		version, c.Pool, c.url, w.worker.Slots(), w.dir, w.name, isolated(w.worker))
	w.admin.announce(out)
	return errors.Join(w.serve(ctx), w.closers.close())
}

// fleetWorker is the parts of a running workerCmd.
type fleetWorker struct {
	cmd      *workerCmd
	log      *slog.Logger
	registry *prometheus.Registry
	second   <-chan struct{} // closed at the second signal

	name, dir string
	admin     adminPage
	storage   *remoteStorage
	jobs      queue.Broker
	worker    *worker.Worker
	needs     needs
	closers   closers
}

// leaseShare is how many times a lease is extended in its time: one call may fail
// without the lease being lost.
const leaseShare = 3

// wire makes the parts, in the order in which they need each other.
func (w *fleetWorker) wire(ctx context.Context) (err error) {
	c := w.cmd
	if err := w.admin.listen(ctx, c.Host, c.HTTPPort); err != nil {
		return err
	}
	if w.dir, err = c.directory(); err != nil {
		return err
	}
	if err := makeDir(w.dir); err != nil {
		return err
	}
	if w.name = c.Name; w.name == "" {
		w.name = uniqueName()
	}
	tracer, closeTracer, err := w.admin.tracer(ctx, c.Traces, w.name)
	if err != nil {
		return err
	}
	w.closers.add(closeTracer)
	if w.jobs, err = c.queueFlags.open(ctx, queueOptions{worker: w.name, log: w.log, registry: w.registry}); err != nil {
		return err
	}
	w.closers.add(w.jobs.Close)
	c.compressFrom = int64(c.CompressFrom)
	if w.storage, err = c.storageFlags.open(w.log, w.registry, append(metrics.Headers(jobHeaders).DialOptions(), tracer.DialOptions()...)...); err != nil {
		return err
	}
	w.closers.add(w.storage.close)
	cached, err := w.storage.withCache(ctx, cacheOptions{
		dir: filepath.Join(w.dir, "cache"), maxBytes: int64(c.CacheSize), minFree: int64(c.MinFree), log: w.log, registry: w.registry,
	})
	if err != nil {
		if errors.Is(err, file.ErrInUse) {
			err = fmt.Errorf("%w (workers of one machine have each a --dir, a --uid_base and an --http_port of their own)", err)
		}
		return err
	}
	w.closers.add(cached.close)
	w.needs = needs{{"queue " + c.url.String(), w.jobs.Ready}, {"storage " + c.Storage, w.storage.ready}}
	properties, err := c.properties()
	if err != nil {
		return err
	}
	images, err := c.openImages(imageOptions{dir: imagesIn(w.dir), sandbox: c.Sandbox, log: w.log, registry: w.registry})
	if err != nil {
		return err
	}
	if images != nil {
		w.closers.add(images.Close)
	}
	w.worker, err = worker.New(c.options(worker.Options{
		Jobs:             w.jobs,
		Updates:          w.jobs,
		Store:            cached.of(""),
		Stores:           cached.of,
		Actions:          w.storage.actions,
		LogStreams:       w.storage.logs,
		Failures:         w.storage.failures,
		Dir:              filepath.Join(w.dir, "work"),
		Pools:            []string{c.Pool},
		Notices:          w.jobs,
		Properties:       withImages(slices.Concat(platform.Host(), properties), images),
		Images:           images,
		Name:             w.name,
		LeaseExtendEvery: c.url.LeaseTime() / leaseShare,
		// Less than what the cache leaves free, so that a full one stops nothing.
		MinFreeDiskBytes: int64(c.MinFree) / 4,
		Hide:             append(append(c.secrets(), secretFiles(append(c.Traces.Secrets(), c.TLSKey, c.TokenFile, c.ImageAuth)...)...), w.dir),
		Addr:             c.targets[0],
		Trace:            traceAttempts(tracer),
		Logger:           w.log,
		Registerer:       w.registry,
	}))
	if err == nil {
		w.closers.add(w.worker.Close)
	}
	return err
}

// jobHeaders has calls to the storage say for which operation they are, and for
// which client.
func jobHeaders(ctx context.Context) []string {
	job := worker.JobOf(ctx)
	if job == nil {
		return nil
	}
	return metrics.OfAction(job.GetOperation(), job.GetRequestMetadata())
}

// jobAttrs are what log lines tell of the job that their context is of.
func jobAttrs(ctx context.Context) []slog.Attr {
	job := worker.JobOf(ctx)
	if job == nil {
		return nil
	}
	return append([]slog.Attr{slog.String("operation", job.GetOperation())}, metrics.ClientAttrs(metrics.ParseRequestMetadata(job.GetRequestMetadata()))...)
}

func (c *workerCmd) directory() (string, error) {
	if c.Dir != "" {
		return filepath.Abs(c.Dir)
	}
	return flags.CacheDir("mettle-worker", "--dir")
}

// serve takes jobs until ctx is done, and then lets those that run end, or hands
// them back.
func (w *fleetWorker) serve(ctx context.Context) error {
	// parts outlive ctx: they are needed until the drain is over.
	parts, stopParts := context.WithCancel(context.WithoutCancel(ctx))
	defer stopParts()
	group, groupCtx := errgroup.WithContext(parts)
	group.Go(func() error { return w.admin.serve(groupCtx, readyDuring(ctx, w.ready), w.worker.Notes) })
	group.Go(func() error { return w.needs.report(groupCtx, w.log) })
	working, stopWork := context.WithCancel(groupCtx)
	defer stopWork()
	worked := make(chan struct{})
	group.Go(func() error {
		defer close(worked)
		return w.worker.Run(working)
	})
	group.Go(func() error {
		defer stopParts()
		select {
		case <-ctx.Done():
		case <-groupCtx.Done():
		}
		drain{worker: w.worker, stop: stopWork, ended: worked, timeout: w.cmd.DrainTimeout, hurry: w.second, log: w.log}.wait()
		return nil
	})
	return group.Wait()
}

// ready is what /readyz says while the worker is there.
func (w *fleetWorker) ready(ctx context.Context) error {
	return errors.Join(w.worker.Ready(), w.needs.ready(ctx))
}
