// Package retry is a decorator for stores that go away and return, as servers do
// that are restarted or moved: what fails because the store can't answer
// (blob.ErrUnavailable) is tried again, with growing, jittered pauses, for up to
// Options.For, so that work stalls and does not fail. Nothing else is tried again. A
// store that says when to come again (blob.BusyError) is left alone until then; where
// that is beyond Options.For, the call fails at once.
//
// FindMissing, entries, and blobs that are read or written in one call are
// repeated. A reader whose store breaks off goes on where it was. Of a Writer what
// was written is kept up to Options.KeepBytes, and written once more; beyond that
// the bytes are gone, and the one who has them writes them again: blob.Repeat does
// so, with the patience of the Store that it finds. What a Store can beside that
// is found in the store inside, by blob.As, and is not repeated, nor do its writers
// have the abilities of those inside.
//
// A worker and an API server put it around elan/client, and nothing between, so
// that one outage is waited for once. The mains wire it.
package retry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
)

const (
	// defaultFor outlasts the restart of a server with a large store, and the
	// move of one to another machine.
	defaultFor = 2 * time.Minute
	// defaultKeepBytes is what elan/client keeps of a blob anyway, until it sends it.
	defaultKeepBytes = 1 << 20
	// firstPause and maxPause are before jitter takes up to half of them: the first
	// for a connection that broke while another is there, the last so that thousands
	// of callers are no load for a store that is coming back.
	firstPause = 20 * time.Millisecond
	maxPause   = 2 * time.Second
)

// Options are those of New. The zero Options are valid.
type Options struct {
	// For is how long a call is tried again from when it first failed; 0 means
	// two minutes. A reader that goes on has that long for each break.
	For time.Duration
	// KeepBytes is how large a blob may be that a Writer keeps, in memory, for
	// being written again; 0 means 1 MiB.
	KeepBytes int64
	// Jitter chooses a time from 0 to its argument, both included, by which a pause
	// is longer. nil: at random.
	Jitter func(time.Duration) time.Duration
	// Logger is told that a store is away, and that it is back. nil: nobody is.
	Logger *slog.Logger
	// Registerer takes the metrics. nil: they are counted for nobody.
	Registerer prometheus.Registerer
}

// Retrier tries again. It is safe for concurrent use and starts no goroutines.
type Retrier struct {
	o                 Options
	repeated, givenUp prometheus.Counter
	waiting           atomic.Int64
	away              atomic.Bool
}

// New checks the options and returns a Retrier, whose stores are one store to
// operators: with the same metrics and the same outages.
func New(o Options) (*Retrier, error) {
	if o.For < 0 || o.KeepBytes < 0 {
		return nil, errors.New("retry: For and KeepBytes may not be negative")
	}
	if o.For == 0 {
		o.For = defaultFor
	}
	if o.KeepBytes == 0 {
		o.KeepBytes = defaultKeepBytes
	}
	if o.Jitter == nil {
		o.Jitter = func(d time.Duration) time.Duration { return rand.N(d + 1) } //nolint:gosec // it spreads load and is no secret
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Retrier{o: o}
	if err := r.register(o.Registerer); err != nil {
		return nil, fmt.Errorf("retry: %w", err)
	}
	return r, nil
}

func (r *Retrier) register(reg prometheus.Registerer) error {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "elan", Subsystem: "retry", Name: name, Help: help})
	}
	r.repeated = counter("repeated_total", "Calls to a store that were made again because it could not be reached.")
	r.givenUp = counter("given_up_total", "Calls to a store that was away for too long.")
	if reg == nil {
		return nil
	}
	waiting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "elan", Subsystem: "retry", Name: "waiting_calls", Help: "Calls that wait for a store to come back.",
	}, func() float64 { return float64(r.waiting.Load()) })
	var err error
	for _, c := range []prometheus.Collector{r.repeated, r.givenUp, waiting} {
		err = errors.Join(err, reg.Register(c))
	}
	return err
}

// repeating marks the context of what is repeated as a whole, within which its
// parts are not.
type repeating struct{}

// Repeat implements blob.Repeater.
func (r *Retrier) Repeat(ctx context.Context, f func(ctx context.Context) error) error {
	within := context.WithValue(ctx, repeating{}, true)
	return r.try(ctx, func() error { return f(within) })
}

// try calls f, again where that may help.
func (r *Retrier) try(ctx context.Context, f func() error) error {
	err := f()
	if err == nil || !errors.Is(err, blob.ErrUnavailable) {
		return err
	}
	return r.again(ctx, err, f)
}

// again is try after f has failed with err.
func (r *Retrier) again(ctx context.Context, err error, f func() error) error {
	if ctx.Value(repeating{}) != nil {
		return err
	}
	r.waiting.Add(1)
	defer r.waiting.Add(-1)
	since := time.Now()
	for n := 0; errors.Is(err, blob.ErrUnavailable); n++ {
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		}
		pause := min(firstPause<<min(n, 16), maxPause)
		after := min(blob.RetryAfter(err), r.o.For+time.Second) // what is longer is too long anyway
		// Never sooner than asked for, and not all at once who were told the same.
		pause = max(pause/2, after) + r.o.Jitter(max(pause, min(after, maxPause))/2)
		if lasted := time.Since(since); lasted+pause > r.o.For {
			r.givenUp.Inc()
			return fmt.Errorf("given up after %d attempts in %v: %w", n+1, lasted.Round(time.Millisecond), err)
		}
		if n == 1 { // once is nothing yet: another server may be there
			r.gone(err)
		}
		if !wait(ctx, pause) {
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		}
		r.repeated.Inc()
		err = f()
	}
	r.back()
	return err
}

// wait waits, and reports whether ctx is not done.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Waiting is how many calls wait for a store to come back.
func (r *Retrier) Waiting() int { return int(r.waiting.Load()) }

func (r *Retrier) gone(err error) {
	if r.away.CompareAndSwap(false, true) {
		r.o.Logger.Warn("the store can't be reached, it is tried again", "for", r.o.For, "error", err)
	}
}

func (r *Retrier) back() {
	if r.away.CompareAndSwap(true, false) {
		r.o.Logger.Info("the store is back")
	}
}
