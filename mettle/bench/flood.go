package bench

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/status"
)

// The subject load measures what a server does for one client while another one
// wants as much of it as it can get. The figures are those of the first: its
// calls, one after the other over a connection of its own, with nothing else going
// on and during the flood, and whether they succeed; and the server's memory.

const (
	// floodFill is how long a flood has to begin all its calls before the
	// measurement.
	floodFill = 10 * time.Second
	// floodEnd is how long it may take to end.
	floodEnd = time.Minute
	// floodPause is how long a client waits that was refused: clients that repeat
	// calls at once are no flood but an accident.
	floodPause = 100 * time.Millisecond
)

// flood is what somebody else wants of the server.
type flood struct {
	calls int // at once
	// begin makes the flood's own connections, and puts what it needs into the
	// server. The op does one call, or holds one until its context ends.
	begin func(context.Context, Options, *client) (op, func(), error)
}

// flooding is a flood that is going on.
type flooding struct {
	begun    atomic.Int64 // calls that were begun first by their goroutines
	mu       sync.Mutex   // guards what follows
	statuses map[string]uint64
}

// run makes the calls until ctx is done.
func (f *flooding) run(ctx context.Context, calls int, call op) {
	var wg sync.WaitGroup
	var seq atomic.Uint64
	for range calls {
		wg.Go(func() {
			for first := true; ctx.Err() == nil; first = false {
				if first {
					f.begun.Add(1)
				}
				err := call(ctx, seq.Add(1))
				if ctx.Err() != nil {
					return
				}
				f.count(err)
				if err != nil {
					pause(ctx, floodPause)
				}
			}
		})
	}
	wg.Wait()
}

func (f *flooding) count(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.statuses[status.Code(unwrapped(err)).String()]++
}

// unwrapped is the status in err, if there is one.
func unwrapped(err error) error {
	if s, ok := errors.AsType[interface {
		error
		GRPCStatus() *status.Status
	}](err); ok {
		return s
	}
	return err
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// flooded measures one scenario of the subject load.
func (r *runner) flooded(ctx context.Context, s scenario) (res Result) {
	res = Result{Subject: s.subject, Case: s.name, Clients: s.clients, Unit: s.unit}
	fail := func(err error) Result {
		if errors.Is(err, errSkip) {
			res.Skipped = err.Error()
		} else if ctx.Err() == nil {
			res.Errors, res.FirstError = 1, err.Error()
		}
		return res
	}
	setup, cancel := context.WithTimeout(ctx, 2*callTimeout)
	defer cancel()
	prepare := prepareGood
	if s.prepare != nil {
		prepare = s.prepare
	}
	good, err := prepare(setup, r.client)
	if err != nil {
		return fail(err)
	}
	call, end, err := s.flood.begin(setup, r.o, r.client)
	if err != nil {
		return fail(fmt.Errorf("prepare: %w", err))
	}
	defer end()
	var seq atomic.Uint64
	quiet := load{clients: s.clients, duration: r.o.Duration / 3}.run(ctx, &seq, good)
	res.QuietLatencyMS = latencyOf(&quiet.lat)
	before, err := r.probe.sample(ctx)
	if err != nil {
		return fail(err)
	}
	peak := r.probe.watch(ctx, true)
	f := &flooding{statuses: map[string]uint64{}}
	flood, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f.run(flood, s.flood.calls, call)
	}()
	for from := time.Now(); f.begun.Load() < int64(s.flood.calls) && time.Since(from) < floodFill && ctx.Err() == nil; {
		pause(ctx, 10*time.Millisecond)
	}
	t := load{clients: s.clients, duration: r.o.Duration}.run(ctx, &seq, good)
	stop()
	select {
	case <-ended:
	case <-time.After(floodEnd):
		return fail(errors.New("the flood's calls do not end when they are cancelled"))
	}
	end()
	highest := peak()
	pause(ctx, r.o.Duration/3) // for the server to clean up
	if res.Server = r.probe.usage(ctx, before, t.lat.n); res.Server != nil {
		res.Server.RSSBeforeBytes, res.Server.PeakRSSBytes = before.rssBytes, highest
		r.probe.recount(ctx, res.Server)
	}
	res.FloodCalls, res.FloodStatuses = s.flood.calls, f.statuses
	res.fill(s, t)
	return res
}

// prepareGood is what the well-behaved client does: it asks for a blob that is not
// there, writes it, and reads it.
func prepareGood(_ context.Context, c *client) (op, error) {
	if err := c.needStorage(); err != nil {
		return nil, err
	}
	blobs := c.newSeries(smallSize)
	return func(ctx context.Context, n uint64) error {
		b := blobs.content(n)
		if err := c.missing(ctx, b.digest); err != nil {
			return err
		}
		if err := c.writeBytes(ctx, b.digest, b.data); err != nil {
			return err
		}
		return c.readBytes(ctx, b.digest)
	}, nil
}
