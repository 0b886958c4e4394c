// Package nats is the broker over NATS JetStream, for several API servers and
// workers on several machines: nats://HOST:4222/PREFIX. It needs nats-server 2.11
// or later with JetStream. The README beside this file tells of the subjects,
// of what happens at each crash, and of what it was measured to do.
//
// Three streams hold what is not to be lost. PREFIX_jobs holds the jobs, one
// message each, until they have ended. PREFIX_leases holds one small record for
// each job that has been leased: whose it is, for which attempt, and who had it
// before. Every step of a lease is a compare-and-set of that record, so that of
// two workers that both believe to have a job one finds out. PREFIX_updates holds
// the updates that their API servers have yet to fetch.
//
// JetStream's own redelivery brings a job to the next worker; whether the lease
// before has indeed lapsed is told by the record alone.
//
// Priorities are mapped to three bands, below 0, 0 and above 0, and within a band
// jobs go out in the order of publishing. It does not share workers fairly
// between invocations.
package nats

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/mettle/queue"
)

// Options are the settings of a Queue. Those that share a prefix must agree on
// LeaseTime, MaxAttempts and the limits.
type Options struct {
	// Servers are the addresses, nats://HOST:PORT or tls://HOST:PORT, one of
	// which must answer. Required.
	Servers []string
	// Prefix begins all subjects and names of streams: letters, digits, - and _,
	// up to 32. Default "mettle".
	Prefix string
	// User and Password, or else Token, or else CredentialsFile, say who we are.
	User, Password, Token, CredentialsFile string
	// Name is the worker's name, as its updates have it, which messages name
	// where a job's attempts are used up. Without it the name is learnt from
	// the updates that are sent here.
	Name string
	// LeaseTime is how long a worker may be silent before its job goes to
	// another. Default 30 s.
	LeaseTime time.Duration
	// MaxAttempts is how many deliveries of a job may fail: by a worker that falls
	// silent, or rejects it. Default 3.
	MaxAttempts int
	// MaxJobs bounds the jobs that wait or run. Default 1,048,576.
	MaxJobs int
	// MaxBytes bounds each of the streams, in bytes. Default: the broker's limit.
	MaxBytes int64
	// Replicas is how many servers of a cluster hold each message: 1, 3 or 5.
	// Default 1.
	Replicas int
	// Memory has the broker keep all in memory, to be lost with it.
	Memory bool
	// UpdatesAge is how long an API server may be away without losing updates.
	// Default 1 h.
	UpdatesAge time.Duration
	// Timeout bounds each call that does not wait for a job: within it, what
	// fails is tried again. Default 5 s.
	Timeout time.Duration
	// Heartbeat is how often the broker tells a waiting consumer that it waits
	// still; when two fail to come, it asks anew. Default 5 s.
	Heartbeat time.Duration
	// MustExist has New fail where Setup has not been run, rather than make the
	// streams. What is there only Setup changes.
	MustExist bool
	// Domain is the JetStream domain of the streams, where the servers named above
	// reach it through another. Default: theirs.
	Domain string
	// CAFile has the certificates of those who may sign a server's, instead of
	// the system's; CertFile and KeyFile are our own to show, where the server
	// asks for one. All are PEM, and have connections be by TLS even where a
	// server's address doesn't say so.
	CAFile, CertFile, KeyFile string
	// Logger is told of lapsed leases and of lost connections. Default: none.
	Logger *slog.Logger
	// Registerer takes the metrics, until the Queue is closed. nil: there are none.
	Registerer prometheus.Registerer
}

// DefaultLease is Options.LeaseTime where it is not set.
const DefaultLease = 30 * time.Second

func (o Options) withDefaults() Options {
	setDefault(&o.Prefix, "mettle")
	setDefault(&o.LeaseTime, DefaultLease)
	setDefault(&o.MaxAttempts, 3)
	setDefault(&o.MaxJobs, 1<<20)
	setDefault(&o.MaxBytes, -1)
	setDefault(&o.Replicas, 1)
	setDefault(&o.UpdatesAge, time.Hour)
	setDefault(&o.Timeout, 5*time.Second)
	setDefault(&o.Heartbeat, 5*time.Second)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

func setDefault[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

func (o Options) validate() error {
	switch {
	case len(o.Servers) == 0:
		return errors.New("nats queue: no server is named")
	case !isPrefix(o.Prefix):
		return fmt.Errorf("nats queue: the prefix %q is not up to 32 letters, digits, - and _", o.Prefix)
	case o.LeaseTime < 100*time.Millisecond:
		return fmt.Errorf("nats queue: a lease time of %v, want at least 100 ms", o.LeaseTime)
	case o.MaxAttempts < 0 || o.MaxJobs < 0 || o.MaxBytes < -1:
		return errors.New("nats queue: a negative limit")
	case o.UpdatesAge < 0 || o.Timeout < 0 || o.Heartbeat < 0:
		return errors.New("nats queue: a negative time")
	case o.Replicas < 1 || o.Replicas > 5:
		return fmt.Errorf("nats queue: %d replicas, want 1 to 5", o.Replicas)
	case o.Domain != "" && !isPrefix(o.Domain):
		return fmt.Errorf("nats queue: the domain %q is not up to 32 letters, digits, - and _", o.Domain)
	case (o.CertFile == "") != (o.KeyFile == ""):
		return errors.New("nats queue: a certificate and its key go together")
	}
	return nil
}

// Queue is a connection to the broker. It is safe for concurrent use.
type Queue struct {
	opts Options
	log  *slog.Logger
	id   string // of this connection, by which the canceller of a job finds its worker
	nc   *natsgo.Conn

	metrics *metrics
	clock   clock // the broker's
	js      jetstream.JetStream
	// The streams, as the broker had them when we connected.
	jobs, leases, updates jetstream.Stream

	making  chan struct{}      // has room for one: who makes an API server's consumer holds it
	stop    context.CancelFunc // ends what runs in the background
	done    chan struct{}      // closed by Close
	running sync.WaitGroup

	// mu guards everything below. Nothing is sent or awaited while it is held.
	mu          sync.Mutex
	closed      bool
	reconnected chan struct{} // closed, and made anew, with each new connection
	graceUntil  time.Time     // until then no lease is taken for lapsed
	violation   error         // the broker's last refusal for want of a right
	consumers   map[string]bool
	inboxes     map[string]bool // the API servers whose consumer has been made
	receiving   map[string]bool // the API servers that receive updates here
	listening   map[string]bool // and those that hear notices
	held        map[leaseKey]*lease
	avoided     map[string]time.Time          // jobs that were rejected here, and until when they are left to others
	fences      map[string]uint32             // updates of these operations count from the attempt after
	tries       map[uint64]context.CancelFunc // the requests that await an answer
	lastTry     uint64
	intakes     map[string]*intake // of jobs, by the list of pools
	published   map[string]*watch  // the jobs of our API servers that have not ended
	watched     map[string]*watch  // those of them that workers have

	// saidMu guards what the workers of this process say, and the order in which
	// that is repeated.
	saidMu    sync.Mutex
	answering bool // listeners that begin are heard
	sayings   map[string]saying
}

var _ queue.Broker = (*Queue)(nil)

// New connects to a broker, and makes there what is lacking unless MustExist is
// set. The context bounds that and no more. The caller closes the Queue. Errors
// wrap queue.ErrUnavailable where no server answers, and queue.ErrRefused where
// one refuses us.
func New(ctx context.Context, o Options) (*Queue, error) {
	q, err := connect(ctx, o)
	if err != nil {
		return nil, err
	}
	err = q.find(ctx)
	if err == nil {
		err = q.setClock(ctx)
	}
	if err == nil {
		err = q.listen(ctx)
	}
	if err != nil {
		_ = q.Close() // the error before says more
		return nil, q.refusedOr(err)
	}
	return q, nil
}

// connect makes a Queue that has no streams yet.
func connect(ctx context.Context, o Options) (*Queue, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	q := &Queue{
		opts: o, log: o.Logger, id: nuid.Next(),
		done: make(chan struct{}), reconnected: make(chan struct{}), stop: func() {},
		consumers: map[string]bool{}, inboxes: map[string]bool{}, receiving: map[string]bool{},
		listening: map[string]bool{}, sayings: map[string]saying{},
		held: map[leaseKey]*lease{}, fences: map[string]uint32{}, published: map[string]*watch{}, watched: map[string]*watch{}, intakes: map[string]*intake{},
		avoided: map[string]time.Time{},
		tries:   map[uint64]context.CancelFunc{}, making: make(chan struct{}, 1),
	}
	dialer, err := q.dialer()
	if err != nil {
		return nil, err
	}
	if q.metrics, err = newMetrics(o.Registerer); err != nil {
		return nil, fmt.Errorf("nats queue: metrics: %w", err)
	}
	if deadline, ok := ctx.Deadline(); ok {
		dialer.Timeout = min(dialer.Timeout, max(time.Until(deadline), time.Millisecond))
	}
	if q.nc, err = dialer.Connect(); err != nil {
		q.metrics.unregister()
		return nil, fmt.Errorf("connect to %v: %w", o.Servers, classifyConnect(err))
	}
	if q.js, err = q.jetStream(); err != nil {
		q.nc.Close()
		q.metrics.unregister()
		return nil, err
	}
	return q, nil
}

// listen begins to hear of what others do to our leases.
func (q *Queue) listen(ctx context.Context) error {
	// The messages come for as long as the Queue is open.
	ctx, q.stop = context.WithCancel(context.WithoutCancel(ctx))
	_, err := q.nc.Subscribe(q.workerSubject(q.id), func(m *natsgo.Msg) { q.onNote(ctx, m) })
	if err != nil {
		return fmt.Errorf("subscribe to %s: %w", q.workerSubject(q.id), err)
	}
	q.running.Go(func() { q.mend(ctx) })
	return nil
}

// Close ends the connection. Those who wait for a job or for updates get an error
// that wraps queue.ErrClosed, as does every later call. Leases that have not
// ended lapse. It may be called twice.
func (q *Queue) Close() error {
	q.mu.Lock()
	if !q.closed {
		q.closed = true
		close(q.done)
	}
	q.mu.Unlock()
	q.stop()
	q.running.Wait()
	q.nc.Close()
	q.metrics.unregister()
	return nil
}

// Ready reports whether the broker answers: nil, or an error that wraps
// queue.ErrUnavailable or queue.ErrClosed.
func (q *Queue) Ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, q.opts.Timeout)
	defer cancel()
	if _, err := q.jobs.Info(ctx); err != nil {
		return fmt.Errorf("ask the broker for its jobs: %w", q.classify(err))
	}
	return nil
}

// Connected reports whether there is a connection to the broker. It asks nobody.
func (q *Queue) Connected() bool { return q.nc.IsConnected() }

// enter counts a call that Close waits for.
func (q *Queue) enter() (leave func(), err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil, queue.ErrClosed
	}
	q.running.Add(1)
	return q.running.Done, nil
}

// leasesOf are the leases here of an operation: two where one is lost and does
// not know it yet.
func (q *Queue) leasesOf(operation string) []*lease {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.DeleteFunc(slices.Collect(maps.Values(q.held)), func(l *lease) bool {
		return l.job.GetOperation() != operation
	})
}
