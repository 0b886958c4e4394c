package nats

import (
	"context"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// A clock is the broker's, by which records are dated. Ours may say something else,
// and may be set while we run: a lease must neither lapse early nor last for that.
type clock struct {
	mu sync.Mutex
	// The broker's clock said theirs when ours, of which only what has passed since then
	// matters, said ours. Zero: it is not known.
	theirs, ours time.Time
	wall         func() time.Time // our own clock, until theirs is known; nil: time.Now
}

// setEvery is how often the broker is asked what time it is, beside once a connection.
const setEvery = 10 * time.Minute

// set takes note of what the broker's clock says in an answer that has just come. It
// is late by the time that the answer took, so that leases last rather a bit longer.
func (c *clock) set(info *jetstream.StreamInfo) {
	if info == nil || info.TimeStamp.IsZero() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.theirs, c.ours = info.TimeStamp.Round(0), time.Now()
}

// until is how long it is until a point in the broker's time.
func (c *clock) until(t time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !c.theirs.IsZero():
		return t.Sub(c.theirs) - time.Since(c.ours)
	case c.wall != nil:
		return t.Sub(c.wall())
	}
	return time.Until(t)
}

// setClock asks the broker what time it is.
func (q *Queue) setClock(ctx context.Context) error {
	return q.try(ctx, callSetup, func(ctx context.Context) error {
		info, err := q.leases.Info(ctx)
		if err == nil {
			q.clock.set(info)
		}
		return err
	})
}
