package api

import (
	"context"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

const (
	// reassignEvery is how often the server looks for operations whose pool has
	// gone; it is there for minutes without workers before it goes.
	reassignEvery = 5 * time.Second
	// maxReassigning bounds the calls of the broker at once.
	maxReassigning = 16
)

// reassign withdraws the jobs that wait for pools that have gone, which nobody
// would ever take. Whoever waits for one begins anew: the action goes to another
// pool that has what it asks for, or is refused.
func (s *Server) reassign(ctx context.Context) error {
	t := time.NewTicker(reassignEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
		_, _, unsettled := s.opts.Platforms.Unsettled()
		if unsettled {
			continue
		}
		names := s.opts.Platforms.Names()
		for pool := range s.ops.Loads() {
			if !slices.Contains(names, pool) {
				s.reassignFrom(ctx, pool)
			}
		}
	}
}

func (s *Server) reassignFrom(ctx context.Context, pool string) {
	jobs := s.ops.QueuedFor(pool)
	if len(jobs) == 0 {
		return
	}
	s.log.WarnContext(ctx, "a pool has gone for which operations wait, they go to others or are refused", "pool", pool, "operations", len(jobs))
	var group errgroup.Group
	group.SetLimit(maxReassigning)
	for _, job := range jobs {
		group.Go(func() error {
			callCtx, cancel := context.WithTimeout(ctx, publishTimeout)
			defer cancel()
			// First the broker: the job may come again by the same name.
			if err := (withdrawer{s}).Cancel(callCtx, job); err != nil {
				s.log.WarnContext(ctx, "job not withdrawn, trying again", "operation", job, "error", err)
				return nil
			}
			s.ops.Withdrawn(&queuepb.Update{Operation: job})
			return nil
		})
	}
	_ = group.Wait() // each has told its error
}
