//go:build linux

package image

import (
	"context"
	"errors"
	"fmt"
)

// flight is work that several wait for. It is cancelled when nobody does.
type flight struct {
	done    chan struct{} // closed at the end, after err is set
	err     error
	waiters int // guarded by Cache.mu
	cancel  context.CancelFunc
}

var errClosed = errors.New("the image cache is closed")

// share runs f once for all who ask for the same key meanwhile.
func (c *Cache) share(ctx context.Context, key string, f func(context.Context) error) error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return errClosed
	}
	fl := c.flights[key]
	if fl == nil {
		fl = c.start(ctx, key, f)
	}
	fl.waiters++
	c.mu.Unlock()
	select {
	case <-fl.done:
		return fl.err
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if fl.waiters--; fl.waiters == 0 {
		if c.flights[key] == fl {
			delete(c.flights, key) // whoever comes now starts anew
		}
		fl.cancel()
	}
	return context.Cause(ctx)
}

// start starts a flight, which outlives the one who asked for it first. The mutex
// is held.
func (c *Cache) start(ctx context.Context, key string, f func(context.Context) error) *flight {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.o.Timeout)
	fl := &flight{done: make(chan struct{}), cancel: cancel}
	c.flights[key] = fl
	c.running.Go(func() {
		defer cancel()
		fl.err = f(ctx)
		if fl.err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
			fl.err = fmt.Errorf("%w: it took longer than %v: %w", ErrUnavailable, c.o.Timeout, fl.err)
		}
		c.mu.Lock()
		if c.flights[key] == fl {
			delete(c.flights, key)
		}
		c.mu.Unlock()
		close(fl.done)
	})
	return fl
}
