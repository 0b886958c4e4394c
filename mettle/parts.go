package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/elan/overview"
	"github.com/mettle-build/mettle/metrics"
	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/operation"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// What dual, api and worker have in common: flags, the page for the operator, and
// how a worker is brought to its end.

// executeFlags are those of all who answer Execute.
type executeFlags struct {
	DefaultTimeout time.Duration `help:"How long an action may run that sets no timeout." default:"1h"`
	MaxTimeout     time.Duration `help:"The longest timeout that an action may set." default:"24h"`
	AbandonAfter   time.Duration `help:"How long an action goes on that no client waits for." default:"5m"`
}

func (f executeFlags) check() error {
	switch {
	case f.DefaultTimeout <= 0 || f.DefaultTimeout > f.MaxTimeout:
		return fmt.Errorf("--default_timeout: %v is not above 0 and up to --max_timeout, %v", f.DefaultTimeout, f.MaxTimeout)
	case f.AbandonAfter <= 0:
		return fmt.Errorf("--abandon_after: %v is not above 0", f.AbandonAfter)
	}
	return nil
}

// slotFlags are those of all who run actions.
type slotFlags struct {
	Slots        int           `help:"How many actions run at once. Default: the number of CPUs."`
	Platform     []string      `help:"A platform property that this machine serves beside OSFamily, Arch and ISA, as key=value; for several, give it several times. * as the value stands for any." placeholder:"KEY=VALUE" sep:";"`
	MinMemory    flags.Size    `name:"min_free_memory" help:"How much memory must be available before an action is taken. 0: a twentieth of it, at most 512MiB." default:"0"`
	Preflight    string        `help:"A shell command that shows, by exit code 0, that this machine has what actions need. It runs as they do, before the first is taken and after trouble." placeholder:"COMMAND"`
	UIDBase      int           `name:"uid_base" help:"Where root runs this: the user and group of the first slot's actions, the second slot has the next. -1: root itself, which no action is kept from anything then." default:"65000"`
	Memory       flags.Size    `name:"action_memory" help:"How much memory an action may use, as in 4GiB; one that needs more is killed, and ends with 137. 0: what there is." default:"0"`
	CPUs         float64       `name:"action_cpus" help:"How many CPUs' time an action may use, as in 1.5. 0: all there are." default:"0"`
	Processes    int           `name:"action_processes" help:"How many processes and threads an action may have at once. 0: 4096 where the machine allows to limit it. -1: as many as there can be." default:"0"`
	Disk         flags.Size    `name:"action_disk" help:"How much an action may write to the disk; one that writes more is killed, and ends with 137. 0: what there is." default:"0"`
	Persistent   int           `name:"persistent_workers" help:"How many tools that speak Bazel's worker protocol each slot keeps running, for actions that are marked for it (persistentWorkerKey). They take the sandbox. 0: none." default:"2"`
	PersistIdle  time.Duration `name:"persistent_worker_idle" help:"How long such a tool is kept running that has nothing to do." default:"5m"`
	AllowNetwork bool          `help:"Let actions that ask for it by the platform property network=external use this machine's network, with all that listens there; others have none."`
	sandboxFlags
	DrainTimeout time.Duration `help:"How long running actions may take to end after SIGTERM; a second signal ends them at once." default:"10m"`
}

func (f slotFlags) check() error {
	switch {
	case f.Slots < 0:
		return fmt.Errorf("--slots: %d is negative", f.Slots)
	case f.UIDBase < -1 || f.UIDBase == 0:
		return fmt.Errorf("--uid_base: %d is no user for actions; -1 is root itself", f.UIDBase)
	case f.CPUs != 0 && (f.CPUs < 0.01 || f.CPUs > 1<<20 || math.IsNaN(f.CPUs)):
		return fmt.Errorf("--action_cpus: %v is not 0, nor 0.01 or more", f.CPUs)
	case f.Processes < -1:
		return fmt.Errorf("--action_processes: %d is negative; -1 is no limit", f.Processes)
	case f.Persistent < 0:
		return fmt.Errorf("--persistent_workers: %d is negative", f.Persistent)
	case f.PersistIdle <= 0:
		return fmt.Errorf("--persistent_worker_idle: %v is not above 0", f.PersistIdle)
	case f.DrainTimeout < 0:
		return fmt.Errorf("--drain_timeout: %v is negative; 0 ends running actions at once", f.DrainTimeout)
	}
	_, err := f.properties()
	return errors.Join(err, f.sandboxFlags.check())
}

// options puts what the flags say into those of the worker.
func (f slotFlags) options(o worker.Options) worker.Options {
	o.Slots = f.Slots
	o.Preflight = f.preflight()
	o.MinFreeMemoryBytes = int64(f.MinMemory)
	o.UIDBase = f.UIDBase
	o.AllowNetwork = f.AllowNetwork
	o = f.sandboxFlags.options(o)
	o.Limits = runner.Limits{MemoryBytes: int64(f.Memory), CPUs: f.CPUs, Processes: f.Processes, DiskBytes: int64(f.Disk)}
	o.PersistentWorkers = f.Persistent
	o.PersistentIdle = f.PersistIdle
	return o
}

// properties are those of --platform.
func (f slotFlags) properties() ([]platform.Property, error) {
	props := make([]platform.Property, 0, len(f.Platform))
	for _, s := range f.Platform {
		p, err := platform.ParseProperty(s)
		if err != nil {
			return nil, fmt.Errorf("--platform: %w", err)
		}
		props = append(props, p)
	}
	return props, nil
}

// preflight is the command of --preflight.
func (f slotFlags) preflight() []string {
	if f.Preflight == "" {
		return nil
	}
	return []string{"/bin/sh", "-c", f.Preflight}
}

// adminPage is the HTTP port: metrics, health, profiles, and an overview.
type adminPage struct {
	name     string
	registry *prometheus.Registry
	log      *slog.Logger
	listener net.Listener // nil without HTTP
	// storesOnly: clients' calls for blobs are not counted here.
	storesOnly bool
	// api's pools are shown. nil: this process has none.
	api *api.Server
}

// listen opens the port, unless it is -1.
func (a *adminPage) listen(ctx context.Context, host string, port int) (err error) {
	if port >= 0 {
		a.listener, err = flags.Listen(ctx, host, port, "--http_port")
	}
	return err
}

// serve serves until ctx is done, if there is a port.
func (a *adminPage) serve(ctx context.Context, ready func(context.Context) error, notes func() []string) error {
	if a.listener == nil {
		return nil
	}
	figures, err := overview.New(overview.Options{Gatherer: a.registry, StoresOnly: a.storesOnly})
	if err != nil {
		return err
	}
	admin, err := metrics.New(metrics.Options{
		Name: a.name, Version: version, Registry: a.registry, Ready: ready, Notes: notes, Pages: figures.Pages(), Tables: a.tables(figures), Logger: a.log,
	})
	if err != nil {
		return err
	}
	return admin.Serve(ctx, a.listener)
}

// announce prints where the page is.
func (a *adminPage) announce(out io.Writer) {
	if a.listener != nil {
		fmt.Fprintf(out, "  Metrics, health and profiles: http://%s/\n", flags.Reachable(a.listener.Addr()))
	}
}

// close closes the port if nobody has served on it.
func (a *adminPage) close() {
	if a.listener != nil {
		_ = a.listener.Close() // closed already where it served
	}
}

// drain is the end of a worker.
type drain struct {
	worker  *worker.Worker
	stop    context.CancelFunc // has it take no more jobs
	ended   <-chan struct{}    // closed when what runs has ended
	timeout time.Duration
	hurry   <-chan struct{} // nil: nothing cuts it short
	log     *slog.Logger
}

// wait returns when what runs has ended, or has been cut off and handed back.
func (d drain) wait() {
	d.log.Info("shutting down: running actions end, a second signal ends them at once", "drain_timeout", d.timeout)
	d.stop()
	late := time.NewTimer(d.timeout)
	defer late.Stop()
	select {
	case <-d.ended:
		return
	case <-late.C:
		d.log.Warn("running actions did not end within the drain timeout, they are cut off")
	case <-d.hurry:
		d.log.Warn("a second signal: running actions are cut off")
	}
	d.worker.Abort()
	<-d.ended
}

// operationInstance is the instance name in an operation's.
func operationInstance(name string) (string, error) {
	n, err := operation.ParseName(name)
	return n.Instance, err
}

// hostname is the machine's name.
func hostname() string {
	if name, err := os.Hostname(); err == nil {
		return name
	}
	return "localhost"
}

// uniqueName is a name that no other process has, nor this one after a restart.
func uniqueName() string { return hostname() + "-" + strings.ToLower(rand.Text()[:8]) }

// closers is what is to be closed, the last first.
type closers []func() error

func (c *closers) add(f func() error) { *c = append(*c, f) }

// close closes all, once.
func (c *closers) close() error {
	var errs []error
	for _, f := range slices.Backward(*c) {
		errs = append(errs, f())
	}
	*c = nil
	return errors.Join(errs...)
}
