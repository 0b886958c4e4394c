package api

import (
	"context"
	"slices"
	"sync"
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
// would ever take. The broker says that it has, and whoever waits for one begins
// anew: the action goes to another pool that has what it asks for, or is refused.
func (s *Server) reassign(ctx context.Context) error {
	t := time.NewTicker(reassignEvery)
	defer t.Stop()
	withdrawn := make(map[string]bool)
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
		var left []string
		names := s.opts.Platforms.Names()
		for pool := range s.ops.Loads() {
			if !slices.Contains(names, pool) {
				left = append(left, s.ops.QueuedFor(pool)...)
			}
		}
		withdrawn = s.reassignJobs(ctx, left, withdrawn)
	}
}

// reassignJobs withdraws jobs, and returns those for which that has succeeded. The
// ones of before, which should not be there any more, are over in any case: the
// broker did not have them, or its word was lost. Until then it is waited for,
// since it can't be told from word of the job that comes next by the same name.
func (s *Server) reassignJobs(ctx context.Context, jobs []string, before map[string]bool) map[string]bool {
	if len(jobs) == 0 {
		return nil
	}
	s.log.WarnContext(ctx, "pools have gone for which operations wait, they go to others or are refused", "operations", len(jobs))
	var mu sync.Mutex // guards withdrawn
	withdrawn := make(map[string]bool)
	var group errgroup.Group
	group.SetLimit(maxReassigning)
	for _, job := range jobs {
		if before[job] {
			s.ops.Withdrawn(&queuepb.Update{Operation: job})
			continue
		}
		group.Go(func() error {
			callCtx, cancel := context.WithTimeout(ctx, publishTimeout)
			defer cancel()
			if err := (withdrawer{s}).Cancel(callCtx, job); err != nil {
				s.log.WarnContext(ctx, "job not withdrawn, trying again", "operation", job, "error", err)
				return nil
			}
			mu.Lock()
			withdrawn[job] = true
			mu.Unlock()
			return nil
		})
	}
	_ = group.Wait() // each has told its error
	return withdrawn
}
