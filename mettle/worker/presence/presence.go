// Package presence tells API servers that a worker is there: what it offers, how
// many actions it runs, and whether it takes more. It says so at its start, when
// something changes, and every so often, so that a worker that dies without a
// word is missed after three times as long.
//
// A change of state is told at once. The number of running actions, which may
// change thousands of times a second, is told at most once a second. Nothing
// that a worker does waits for this, and a broker that is away is no reason to
// stop: what is lost is said again.
//
// It knows no queue's kind and nothing of actions. mettle/worker, its caller,
// tells it what happens.
package presence

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Options are the settings of a Presence.
type Options struct {
	// Notices takes what is told. Required.
	Notices queue.Notifier
	// Worker is the name, which no other worker has. Required.
	Worker string
	// Pools are those whose jobs the worker takes, each of which hears of it. Required.
	Pools []string
	// Properties are what the worker offers.
	Properties []platform.Property
	// Slots is how many actions it can run at once.
	Slots int
	// Every is how often it says that it is there, give or take a tenth, so that
	// the workers of a fleet don't all speak at once. Default 15 s.
	Every time.Duration
	// Logger is told when the broker can't be told, and when it can again.
	// Default: none.
	Logger *slog.Logger
}

const (
	// lifetimes is how many times in a row a worker may fail to be heard.
	lifetimes = 3
	// coalesce is the time between two notices whose only news is how many actions run.
	coalesce = time.Second
	// notifyTimeout bounds one call.
	notifyTimeout = 5 * time.Second
	// retry is how long after a call that failed another is made.
	retry = time.Second
)

// Presence tells of one worker. It is safe for concurrent use.
type Presence struct {
	o    Options
	wake chan struct{} // of capacity 1: a token says that there is something new
	// jitter is Run's. Its seed is the worker's name: those of a fleet differ, and
	// a simulation of one goes the same way each time.
	jitter *rand.Rand

	running atomic.Int32
	// counted says that running has changed since it was told.
	counted atomic.Bool

	mu     sync.Mutex // guards the rest
	state  queuepb.WorkerState_State
	reason string
	urgent bool // state or reason has not been told
}

// New makes a Presence, of a worker that takes jobs. The caller runs it by Run.
func New(o Options) (*Presence, error) {
	if o.Notices == nil || o.Worker == "" || len(o.Pools) == 0 {
		return nil, errors.New("presence: Options need Notices, Worker and Pools")
	}
	if o.Slots < 0 || o.Every < 0 {
		return nil, errors.New("presence: a negative option")
	}
	if o.Every == 0 {
		o.Every = 15 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	name := fnv.New64a()
	_, _ = name.Write([]byte(o.Worker))              // never fails
	jitter := rand.New(rand.NewPCG(name.Sum64(), 0)) //nolint:gosec // it is no secret
	return &Presence{o: o, wake: make(chan struct{}, 1), jitter: jitter, state: queuepb.WorkerState_TAKING}, nil
}

// Add says that n actions more run, or fewer. It does not block.
func (p *Presence) Add(n int) {
	p.running.Add(int32(n)) //nolint:gosec // a few hundred at most
	if p.counted.CompareAndSwap(false, true) {
		p.signal()
	}
}

// Set says what state the worker is in, and why: it does not block. Nothing
// follows upon DRAINING; that it is GONE Run says itself.
func (p *Presence) Set(state queuepb.WorkerState_State, reason string) {
	p.mu.Lock()
	if p.state == queuepb.WorkerState_DRAINING || p.state == state && p.reason == reason {
		p.mu.Unlock()
		return
	}
	p.state, p.reason, p.urgent = state, reason, true
	p.mu.Unlock()
	p.signal()
}

func (p *Presence) signal() {
	select {
	case p.wake <- struct{}{}:
	default: // there is a token
	}
}

// Run tells what there is to tell until ctx is done, then that the worker is
// gone, and returns. There is one Run at a time.
func (p *Presence) Run(ctx context.Context) {
	p.mu.Lock()
	p.urgent = true
	p.mu.Unlock()
	var told time.Time // when something was last told
	failed := false
	next := time.NewTimer(0)
	defer next.Stop()
	for ctx.Err() == nil {
		select {
		case <-p.wake:
			if failed || ctx.Err() != nil {
				continue // it is tried again when next fires
			}
			if left := coalesce - time.Since(told); left > 0 && !p.isUrgent() {
				next.Reset(left)
				continue
			}
		case <-next.C:
		case <-ctx.Done():
			continue
		}
		err := p.tell(ctx)
		told = time.Now()
		failed = p.report(ctx, err, failed)
		if failed {
			next.Reset(retry)
		} else {
			next.Reset(p.pause())
		}
	}
	p.leave(ctx)
}

// report tells the log when the broker has gone, or is back, and reports
// whether it is away.
func (p *Presence) report(ctx context.Context, err error, failed bool) bool {
	switch {
	case err == nil && failed:
		p.o.Logger.InfoContext(ctx, "API servers can be told of this worker again")
	case err != nil && !failed && ctx.Err() == nil:
		p.o.Logger.WarnContext(ctx, "API servers can't be told of this worker, trying again", "error", err)
	}
	return err != nil
}

func (p *Presence) isUrgent() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.urgent
}

// pause is the time to the next notice where nothing happens.
func (p *Presence) pause() time.Duration {
	return p.o.Every*9/10 + time.Duration(p.jitter.Int64N(int64(p.o.Every/5)+1))
}

// tell tells the state as it is. What changes in the meantime is told next.
func (p *Presence) tell(ctx context.Context) error {
	p.counted.Store(false)
	p.mu.Lock()
	state, reason := p.state, p.reason
	p.urgent = false
	p.mu.Unlock()
	err := p.notify(ctx, state, reason)
	if err != nil {
		p.mu.Lock()
		p.urgent = true
		p.mu.Unlock()
	}
	return err
}

// leave says that the worker is gone, with a timeout of its own: ctx is done.
func (p *Presence) leave(ctx context.Context) {
	if err := p.notify(context.WithoutCancel(ctx), queuepb.WorkerState_GONE, ""); err != nil {
		p.o.Logger.WarnContext(ctx, "API servers were not told that this worker has ended", "error", err)
	}
}

func (p *Presence) notify(ctx context.Context, state queuepb.WorkerState_State, reason string) error {
	ctx, cancel := context.WithTimeout(ctx, notifyTimeout)
	defer cancel()
	s := &queuepb.WorkerState{
		Worker:   p.o.Worker,
		Slots:    int32(p.o.Slots), //nolint:gosec // a few hundred at most
		Running:  p.running.Load(),
		State:    state,
		Reason:   reason,
		Lifetime: durationpb.New(lifetimes * p.o.Every),
	}
	for _, prop := range p.o.Properties {
		s.Properties = append(s.Properties, &queuepb.Property{Name: prop.Name, Value: prop.Value})
	}
	for _, pool := range p.o.Pools {
		s := proto.CloneOf(s) // a queue keeps what it is given
		s.Pool = pool
		if err := p.o.Notices.Notify(ctx, &queuepb.Notice{Sent: timestamppb.Now(), About: &queuepb.Notice_Worker{Worker: s}}); err != nil {
			return fmt.Errorf("tell of worker %s in pool %s: %w", p.o.Worker, pool, err)
		}
	}
	return nil
}
