package relay

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
)

const (
	// firstPause and maxPause are between attempts, and are jittered: what came
	// back must not be met by all who waited at one moment.
	firstPause = 25 * time.Millisecond
	maxPause   = 2 * time.Second
	// answerBefore is how long before its deadline a call is told that the storage
	// is away, so that the client hears why.
	answerBefore = time.Second
)

// attempts are those of one call.
type attempts struct {
	r     *Relay
	m     *method
	until time.Time // when waiting ends; zero before the first wait
	n     int
	asked int // for a log stream, and it was elsewhere
}

// deadline is when waiting ends, for a call that begins to wait now.
func (a *attempts) deadline(ctx context.Context) time.Time {
	if !a.until.IsZero() {
		return a.until
	}
	now := time.Now()
	a.until = now.Add(a.r.o.Wait)
	if end, ok := ctx.Deadline(); ok {
		if t := end.Add(-min(answerBefore, end.Sub(now)/10)); t.Before(a.until) {
			a.until = t
		}
	}
	return a.until
}

// conn returns the connection for the next attempt, when one is ready. The error
// is a status.
func (a *attempts) conn(ctx context.Context) (*grpc.ClientConn, error) {
	conns := a.r.o.Conns
	turn := a.r.turn.Add(1)
	for i := range conns {
		c := conns[(turn+uint64(i))%uint64(len(conns))] //nolint:gosec // not negative
		if c.GetState() == connectivity.Ready {
			a.r.back()
			return c, nil
		}
	}
	return a.wait(ctx, turn)
}

// wait is conn where none is ready.
func (a *attempts) wait(ctx context.Context, turn uint64) (*grpc.ClientConn, error) {
	leave, err := a.r.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	wctx, cancel := context.WithDeadline(ctx, a.deadline(ctx))
	defer cancel()
	conns := a.r.o.Conns
	c := conns[turn%uint64(len(conns))]
	for {
		state := c.GetState()
		if state == connectivity.Ready {
			a.r.back()
			return c, nil
		}
		if state == connectivity.TransientFailure {
			a.r.gone()
		}
		c.Connect()
		if !c.WaitForStateChange(wctx, state) {
			if err := ctx.Err(); err != nil {
				return nil, status.FromContextError(err).Err()
			}
			a.r.metrics.givenUp.Inc()
			return nil, status.Error(codes.Unavailable, "the storage can't be reached")
		}
	}
}

// again reports whether the call is to be made again after err, when it is time.
// answered is whether the storage has said so itself.
func (a *attempts) again(ctx context.Context, err error, answered bool) bool {
	if status.Code(err) != codes.Unavailable || ctx.Err() != nil || (answered && a.m.once) {
		return false
	}
	pause := time.Duration(0)
	// Where a connection broke, another server may be there at once.
	if a.n > 0 || answered {
		pause = min(firstPause<<min(a.n, 16), maxPause)
		pause = pause/2 + rand.N(pause/2+1) //nolint:gosec // it is no secret
	}
	a.n++
	if time.Now().Add(pause).After(a.deadline(ctx)) {
		a.r.metrics.givenUp.Inc()
		return false
	}
	if pause > 0 && !a.pause(ctx, pause) {
		return false
	}
	a.r.metrics.repeated.Inc()
	return true
}

// pause waits, and reports whether the call is still of use.
func (a *attempts) pause(ctx context.Context, d time.Duration) bool {
	leave, err := a.r.enter()
	if err != nil {
		return false
	}
	defer leave()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// enter counts one call that waits, until leave.
func (r *Relay) enter() (leave func(), err error) {
	if n := r.waiting.Add(1); n > int64(r.o.MaxWaiting) {
		r.waiting.Add(-1)
		return nil, status.Errorf(codes.Unavailable, "the storage can't be reached, and %d calls wait for it already", n-1)
	}
	return func() { r.waiting.Add(-1) }, nil
}

// gone and back log what became of the storage, once each.
func (r *Relay) gone() {
	if !r.away.Load() && r.away.CompareAndSwap(false, true) {
		r.o.Logger.Warn("the storage can't be reached, calls wait for it", "wait", r.o.Wait)
	}
}

func (r *Relay) back() {
	if r.away.Load() && r.away.CompareAndSwap(true, false) {
		r.o.Logger.Info("the storage is back")
	}
}

// Waiting is how many calls wait for the storage now.
func (r *Relay) Waiting() int { return int(r.waiting.Load()) }
