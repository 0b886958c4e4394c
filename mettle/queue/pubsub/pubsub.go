// Package pubsub is the broker over Google Cloud Pub/Sub: jobs go through one
// topic to one subscription for each platform pool and priority band, updates
// through another topic to a filtered, expiring subscription that each API
// server makes for itself, notices through a third one to every API server, and
// cancellations through a fourth one to every worker. The README beside this
// file lists the resources, their attributes, what is promised at each crash, and
// what an action costs.
//
// A queue is opened by a URL, of which the pools are only read by Setup:
//
//	gcppubsub://PROJECT/PREFIX?lease=60s&attempts=3&bands=true&pools=default,arm
//
// PUBSUB_EMULATOR_HOST names another server, without credentials.
//
// Jobs are asked for by Pull, as many as there are consumers that wait, and not
// by a stream: what a stream has sent lies in a buffer with its lease running,
// while another worker is idle. Leases are kept by ModifyAckDeadline, for as
// long as the worker says, and not by the high-level client, which extends
// them up to a bound of its own without telling that one was lost. Exactly-once
// delivery is not asked for: it makes each hand-off slower, and what it would
// give, that a lost lease is noticed, a clock gives as well: a lease that was
// not extended in time, by this process's own clock, is gone. What the broker
// delivers twice all the same runs twice and ends once: the first COMPLETED
// that reaches the API server is the end of an operation.
//
// Pub/Sub counts deliveries, and what is bounded here are failures: so a job that
// is handed back is published again, with what has become of it in its
// attributes, before its message is acknowledged.
//
// It does not merge equal jobs: an API server knows those of its own, and of
// two servers' equal jobs both run, unless the second one finds the first one's
// result in the ActionCache. It has priorities by three bands, and no fairness
// between invocations. Mettle's mains open it; api and worker know only the
// contracts of package queue.
package pubsub

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	vkit "cloud.google.com/go/pubsub/v2/apiv1"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/mettle-build/mettle/mettle/queue"
)

// Options are the settings of a Queue. Project and Prefix are required.
type Options struct {
	// Project is the id of the Google Cloud project.
	Project string
	// Prefix begins the names of all topics and subscriptions.
	Prefix string
	// LeaseTime is how long a worker may be silent before its job goes to
	// another: whole seconds, from 10 s to 600 s; an emulator may take less.
	// All processes must have the same, and Setup must have run with it.
	// Default 60 s.
	LeaseTime time.Duration
	// MaxAttempts is how many deliveries of a job may fail, at most 50. Default 3.
	MaxAttempts int
	// OneBand has all priorities share one subscription a pool: fewer calls,
	// and no priorities. All processes must have the same.
	OneBand bool
	// Pools are those that Setup makes subscriptions for. Default: queue.DefaultPool.
	Pools []string
	// MaxInline is how large a job's Action and Command may be together to
	// travel in it, in bytes. Larger ones the worker reads from the CAS. Default 256 KiB.
	MaxInline int
	// MaxOperations bounds what is remembered of operations that were published
	// from here and of updates that came, in operations. Default 262,144.
	MaxOperations int
	// CallTimeout bounds each call, with all that is tried again. Default 10 s.
	CallTimeout time.Duration
	// Endpoint is the host:port of an emulator, spoken to without TLS and
	// credentials. Default: what PUBSUB_EMULATOR_HOST says; where that is empty
	// too, Google Cloud.
	Endpoint string
	// Registerer is given the metrics, if it is not nil.
	Registerer prometheus.Registerer
	// Logger is told of redeliveries, reconnections and what Setup does. Default: none.
	Logger *slog.Logger
}

// DefaultLease is Options.LeaseTime where it is not set.
const DefaultLease = 60 * time.Second

func (o Options) withDefaults() Options {
	if o.LeaseTime == 0 {
		o.LeaseTime = DefaultLease
	}
	if o.MaxAttempts == 0 {
		o.MaxAttempts = 3
	}
	if len(o.Pools) == 0 {
		o.Pools = []string{queue.DefaultPool}
	}
	if o.MaxInline == 0 {
		o.MaxInline = 256 << 10
	}
	if o.MaxOperations == 0 {
		o.MaxOperations = 1 << 18
	}
	if o.CallTimeout == 0 {
		o.CallTimeout = 10 * time.Second
	}
	if o.Endpoint == "" {
		o.Endpoint = os.Getenv("PUBSUB_EMULATOR_HOST")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

func (o Options) validate() error {
	least := 10 * time.Second
	if o.Endpoint != "" {
		least = time.Second
	}
	switch {
	case o.Project == "" || o.Prefix == "":
		return errors.New("pub/sub queue: the project or the prefix is missing")
	case !isPlain(o.Prefix) || len(o.Prefix) > 80 || strings.HasPrefix(o.Prefix, "goog"):
		return fmt.Errorf("pub/sub queue: the prefix %q is not of up to 80 letters, digits, dashes and underscores, a letter first and not goog", o.Prefix)
	case o.LeaseTime < least || o.LeaseTime > 600*time.Second || o.LeaseTime%time.Second != 0:
		return fmt.Errorf("pub/sub queue: the lease of %v is not of %v to 10m, in whole seconds", o.LeaseTime, least)
	case o.MaxAttempts < 1 || o.MaxAttempts > 50:
		return fmt.Errorf("pub/sub queue: %d attempts are not from 1 to 50", o.MaxAttempts)
	case o.MaxInline < 0 || o.MaxInline > maxMessage/2 || o.MaxOperations < 1 || o.CallTimeout < 0:
		return errors.New("pub/sub queue: a limit is out of bounds")
	}
	return nil
}

// maxMessage bounds what is put into one message or one call, in bytes. The
// service takes 10 MB, attributes and names included.
const maxMessage = 9 << 20

// Queue is one process's side of the broker. It is safe for concurrent use.
type Queue struct {
	opts    Options
	log     *slog.Logger
	metrics *metrics
	id      string // of this process, random
	topics  *vkit.TopicAdminClient
	subs    *vkit.SubscriptionAdminClient
	pulse   pulse
	seq     atomic.Int64 // the number of the last update that was sent

	jobs, updates, cancels, notices *publisher

	done  chan struct{} // closed by Close
	tasks sync.WaitGroup
	stop  context.CancelFunc // ends what runs in tasks
	start func(f func(ctx context.Context)) bool

	// making is a lock of capacity 1 that is held while a subscription of this
	// process's own is made, or a pool is looked at.
	making chan struct{}

	// mu guards everything below. There is no I/O under it.
	mu        sync.Mutex
	closed    bool
	listening bool                        // this process hears of cancellations
	ears      map[string]bool             // who listens to notices
	sayings   map[string]saying           // by worker
	replies   map[string]bool             // whose reply subscriptions are there; true: being received from
	pools     map[string]time.Time        // when a pool's subscription was seen last
	sources   map[string]*source          // by subscription
	stations  map[string]*station         // by pools
	leases    map[string]*lease           // by message
	acks      map[string]*batcher[string] // by subscription
	known     *fifo[*operation]           // API server: by operation
	withdrawn *fifo[*withdrawal]          // worker: by operation
	delivered *fifo[uint32]               // worker: deliveries seen, by message
	ended     *fifo[struct{}]             // worker: the messages that need nothing but an acknowledgement
}

var _ queue.Broker = (*Queue)(nil)

// New opens a queue. It makes no calls yet; ctx bounds the search for
// credentials. The caller closes the queue.
func New(ctx context.Context, o Options) (*Queue, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, fmt.Errorf("pub/sub queue: %w", err)
	}
	q := &Queue{
		opts: o, log: o.Logger, metrics: m, id: rand.Text()[:16], pulse: pulse{began: time.Now()},
		done: make(chan struct{}), making: make(chan struct{}, 1),
		ears: make(map[string]bool), sayings: make(map[string]saying), replies: make(map[string]bool), pools: make(map[string]time.Time),
		sources: make(map[string]*source), stations: make(map[string]*station), leases: make(map[string]*lease), acks: make(map[string]*batcher[string]),
		known: newFIFO[*operation](o.MaxOperations), withdrawn: newFIFO[*withdrawal](maxRemembered),
		delivered: newFIFO[uint32](maxRemembered), ended: newFIFO[struct{}](maxRemembered),
	}
	if err := q.dial(ctx); err != nil {
		m.unregister()
		return nil, err
	}
	// Tasks outlive the call that starts them, and end with Close.
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	q.stop = stop
	q.start = func(f func(ctx context.Context)) bool {
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.closed {
			return false
		}
		q.tasks.Go(func() { f(life) })
		return true
	}
	q.jobs = q.newPublisher(q.topic("jobs"))
	q.updates = q.newPublisher(q.topic("updates"))
	q.cancels = q.newPublisher(q.topic("cancel"))
	q.notices = q.newPublisher(q.topic("notices"))
	return q, nil
}

// maxRemembered bounds what a worker remembers of withdrawn operations and of
// messages. What it has forgotten is run once more, or counted anew.
const maxRemembered = 1 << 16

func (q *Queue) dial(ctx context.Context) error {
	opts := []option.ClientOption{
		option.WithUserAgent("mettle"), option.WithTelemetryDisabled(),
		option.WithGRPCDialOption(grpc.WithChainUnaryInterceptor(q.metrics.unary, q.pulse.unary)),
		option.WithGRPCDialOption(grpc.WithChainStreamInterceptor(q.metrics.stream)),
		option.WithGRPCDialOption(grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64 << 20))),
	}
	if q.opts.Endpoint == "" {
		// A connection that is dead looks alive. Emulators do not take pings.
		opts = append(opts, option.WithGRPCDialOption(grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second})))
	} else {
		opts = append(opts, option.WithEndpoint(q.opts.Endpoint), option.WithoutAuthentication(),
			option.WithGRPCDialOption(grpc.WithTransportCredentials(insecure.NewCredentials())))
	}
	var err error
	if q.topics, err = vkit.NewTopicAdminClient(ctx, opts...); err != nil {
		return fmt.Errorf("pub/sub queue: %w", err)
	}
	if q.subs, err = vkit.NewSubscriptionAdminClient(ctx, opts...); err != nil {
		return errors.Join(fmt.Errorf("pub/sub queue: %w", err), q.topics.Close())
	}
	// What is tried again, and for how long, is decided in call.
	q.topics.CallOptions, q.subs.CallOptions = &vkit.TopicAdminCallOptions{}, &vkit.SubscriptionAdminCallOptions{}
	return nil
}

// Close ends all calls, hands back what no consumer has taken, removes this
// process's own subscription and closes the connections. Leases are not ended:
// their workers do that before.
func (q *Queue) Close() error {
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return nil
	}
	q.closed = true
	close(q.done)
	q.mu.Unlock()
	q.stop()
	q.tasks.Wait()

	// New's context may be long gone: this is the last, and bounded by itself.
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	q.putAllBack(ctx)
	if q.hears() {
		q.dropSubscription(ctx, q.cancelSubscription())
	}
	q.metrics.unregister()
	return errors.Join(q.topics.Close(), q.subs.Close())
}

const closeTimeout = 3 * time.Second

// isClosed reports whether Close was called.
func (q *Queue) isClosed() bool {
	select {
	case <-q.done:
		return true
	default:
		return false
	}
}

// nextSeq numbers updates: rising within a process, and about the time of day,
// so that it rises from one process to the next as well.
func (q *Queue) nextSeq() int64 {
	for {
		last := q.seq.Load()
		if next := max(last+1, time.Now().UnixNano()); q.seq.CompareAndSwap(last, next) {
			return next
		}
	}
}
