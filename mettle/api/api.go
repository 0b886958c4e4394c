// Package api is the Execution service: it accepts Execute and WaitExecution,
// answers from the ActionCache where it can, merges identical actions, gives
// jobs to the queue, and streams to every client the newest state of what it
// waits for.
//
// A call passes through it like this. The request is checked, which costs no
// I/O. The ActionCache is asked; a hit is the only answer. Otherwise the Action
// and the Command are read and checked, the platform gives the pool, and the
// operation is joined or created and its job published. The client hears of all
// this within firstMessageAfter, however slow the storage is. From then on the
// stream follows the operation: it sends what changed, and at least every
// KeepAlive the newest state again.
//
// No call waits for another: each stream reads the newest state of its operation
// and sends it by itself, so a slow client holds up nobody. Every call has an
// operation name of its own, also where several share one execution, and the
// name says all that is needed to resume it on any server (package operation).
//
// It runs nothing itself, knows no worker and no store's kind, and is called by
// gRPC; main wires it.
package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/command"
	"github.com/mettle-build/mettle/mettle/history"
	"github.com/mettle-build/mettle/mettle/operation"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Options are the settings of a Server.
type Options struct {
	// ID is the address to which updates come; no other server that is up has
	// the same. Required.
	ID string
	// Store has the Actions and Commands. Required.
	Store blob.Opener
	// Stores gives the blobs of an instance, where each has its own: see
	// elan/blob/instances. nil: Store, for all of them.
	Stores func(instance string) blob.Store
	// Actions is the ActionCache. Required.
	Actions action.Getter
	// Jobs and Updates are the two directions of the queue. Required.
	Jobs    queue.Publisher
	Updates queue.Receiver
	// Notices is how this server hears of workers, and it and the others of each
	// other. nil: there are none, and Platforms knows what it was told.
	Notices Notices
	// Platforms says which pool runs what; the server tells it what workers say of
	// themselves. Required.
	Platforms *platform.Set
	// DefaultTimeout is that of an Action without one, and MaxTimeout the
	// longest that an Action may have. Defaults 1 h and 24 h.
	DefaultTimeout, MaxTimeout time.Duration
	// AbandonAfter is how long an operation goes on while nobody waits for it.
	// Default 5 min.
	AbandonAfter time.Duration
	// KeepAlive is how often a waiting client hears something, at most 30 s,
	// which balancers and clients can bear. Default 20 s.
	KeepAlive time.Duration
	// MaxActionBytes bounds an Action, and a Command. Default 16 MiB.
	MaxActionBytes int64
	// List lets whoever reaches the server list its operations, of all clients.
	List bool
	// Logger is told of what operators should know. Default: none.
	Logger *slog.Logger
	// Registerer gets the metrics. Default: none does.
	Registerer prometheus.Registerer
}

// Notices are the parts of queue.Broker by which servers hear of workers and of
// each other.
type Notices interface {
	queue.Notifier
	queue.Listener
}

// maxKeepAlive is the longest silence that clients, proxies and balancers can
// bear alike; many of them give up after a minute.
const maxKeepAlive = 30 * time.Second

func (o Options) withDefaults() Options {
	if o.DefaultTimeout == 0 {
		o.DefaultTimeout = time.Hour
	}
	if o.MaxTimeout == 0 {
		o.MaxTimeout = max(24*time.Hour, o.DefaultTimeout)
	}
	if o.KeepAlive == 0 {
		o.KeepAlive = 20 * time.Second
	}
	if o.MaxActionBytes == 0 {
		o.MaxActionBytes = 16 << 20
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

func (o Options) validate() error {
	switch {
	case o.ID == "":
		return errors.New("execution service: the ID is missing")
	case o.Store == nil || o.Actions == nil:
		return errors.New("execution service: Store and Actions are required")
	case o.Jobs == nil || o.Updates == nil:
		return errors.New("execution service: Jobs and Updates are required")
	case o.Platforms == nil:
		return errors.New("execution service: Platforms are required")
	case o.DefaultTimeout < 0 || o.DefaultTimeout > o.MaxTimeout:
		return fmt.Errorf("execution service: the default timeout %v is not between 0 and the maximum, %v", o.DefaultTimeout, o.MaxTimeout)
	case o.KeepAlive < 0 || o.KeepAlive > maxKeepAlive:
		return fmt.Errorf("execution service: the keep-alive interval %v is not between 0 and %v", o.KeepAlive, maxKeepAlive)
	case o.MaxActionBytes < 0:
		return errors.New("execution service: a negative limit")
	}
	return nil
}

// Server is the Execution service, and google.longrunning.Operations for what
// that one has begun. It is safe for concurrent use.
type Server struct {
	repb.UnimplementedExecutionServer
	longrunningpb.UnimplementedOperationsServer

	opts      Options
	log       *slog.Logger
	ops       *operation.Registry
	store     func(instance string) blob.Opener
	history   *history.History
	raiser    queue.Raiser // nil: the queue is none
	cacheable *recent      // the digests of Actions without do_not_cache
	metrics   *metrics
	unsaid    chan *queuepb.Notice // what the other API servers are to be told
	answers   *answers

	drainOnce sync.Once
	draining  chan struct{} // closed by Shutdown
}

var _ repb.ExecutionServer = (*Server)(nil)

// New makes a Server. The caller registers it and runs it by Run.
func New(o Options) (*Server, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	s := &Server{
		opts:      o,
		store:     func(string) blob.Opener { return o.Store },
		log:       o.Logger,
		cacheable: newRecent(),
		unsaid:    make(chan *queuepb.Notice, maxUnsaid),
		answers:   newAnswers(),
		draining:  make(chan struct{}),
	}
	if o.Stores != nil {
		s.store = func(instance string) blob.Opener { return o.Stores(instance) }
	}
	var err error
	s.ops, err = operation.NewRegistry(operation.RegistryOptions{Jobs: withdrawer{s}, AbandonAfter: o.AbandonAfter, Logger: o.Logger})
	if err != nil {
		return nil, err
	}
	if s.metrics, err = newMetrics(o.Registerer, s.ops, o.Platforms); err != nil {
		return nil, fmt.Errorf("execution service: %w", err)
	}
	if s.history, err = history.New(history.Options{Registerer: o.Registerer}); err != nil {
		return nil, fmt.Errorf("execution service: %w", err)
	}
	s.raiser, _ = o.Jobs.(queue.Raiser)
	return s, nil
}

// Register makes r serve the Execution and the Operations service.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	repb.RegisterExecutionServer(r, s)
	longrunningpb.RegisterOperationsServer(r, s)
}

// Capabilities is what the server can do, as Capabilities of the API tells it.
// The caller owns it.
func (s *Server) Capabilities() *repb.ExecutionCapabilities {
	c := &repb.ExecutionCapabilities{
		DigestFunction: digest.Functions()[0].Proto(),
		ExecEnabled:    true,
		ExecutionPriorityCapabilities: &repb.PriorityCapabilities{
			Priorities: []*repb.PriorityCapabilities_PriorityRange{{MinPriority: math.MinInt32, MaxPriority: math.MaxInt32}},
		},
		SupportedNodeProperties: []string{command.PropertyMtime, command.PropertyUnixMode},
	}
	for _, fn := range digest.Functions() {
		c.DigestFunctions = append(c.DigestFunctions, fn.Proto())
	}
	return c
}

// receiveRetry is how long Run waits before it asks a broker again that failed.
const receiveRetry = time.Second

// Run receives the updates and notices of workers and winds up abandoned operations, until
// ctx is done, and returns nil then; or until the queue is closed, and returns
// an error that wraps queue.ErrClosed. All that it started has ended when it
// returns, and Shutdown has been called. There is one Run at a time.
func (s *Server) Run(ctx context.Context) error {
	defer s.Shutdown()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.ops.Run(ctx) })
	g.Go(func() error { return s.receive(ctx) })
	if s.opts.Notices != nil {
		g.Go(func() error { return s.listen(ctx) })
		g.Go(func() error { return s.echo(ctx) })
		g.Go(func() error { return s.reassign(ctx) })
		for range speakers {
			g.Go(func() error { return s.speak(ctx) })
		}
	}
	return g.Wait()
}

func (s *Server) receive(ctx context.Context) error {
	return s.again(ctx, "updates not received, trying again", func() error {
		return s.opts.Updates.ReceiveUpdates(ctx, s.opts.ID, s.update)
	})
}

// again calls f until ctx is done or the queue is closed.
func (s *Server) again(ctx context.Context, trouble string, f func() error) error {
	for {
		err := f()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, queue.ErrClosed):
			return err
		case err != nil:
			s.log.WarnContext(ctx, trouble, "error", err) //nolint:sloglint // a constant of the caller's
		}
		select {
		case <-ctx.Done():
		case <-time.After(receiveRetry):
		}
	}
}

// Shutdown ends the streams, those that have a result with it and the others
// with UNAVAILABLE, upon which clients resume them by WaitExecution, and has new
// calls refused likewise. It does not wait for them; the gRPC server does. What
// is queued stays queued. It may be called several times.
func (s *Server) Shutdown() {
	s.drainOnce.Do(func() { close(s.draining) })
}
