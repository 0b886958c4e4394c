package operation

import (
	"context"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// withdrawTimeout bounds one call of Withdrawer.Cancel.
	withdrawTimeout = 10 * time.Second
	// maxWithdrawing bounds the calls at once.
	maxWithdrawing = 16
	// withdrawRetry is how long after a failure the next try is.
	withdrawRetry = 5 * time.Second
)

// A withdrawal is a job that is to be withdrawn.
type withdrawal struct {
	name  string
	until time.Time // it is tried again until then
}

// withdraw withdraws the jobs that are to be, some at a time: a build that is
// cancelled may have thousands. After a failure, which is likely to be the
// broker's, no more are begun, and what is left is tried again later.
func (r *Registry) withdraw(ctx context.Context) {
	r.mu.Lock()
	all := r.withdrawals
	r.withdrawals = nil
	r.mu.Unlock()
	if len(all) == 0 {
		return
	}
	var group errgroup.Group
	group.SetLimit(maxWithdrawing)
	var down atomic.Bool
	for _, w := range all {
		if down.Load() {
			r.again(w)
			continue
		}
		group.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, withdrawTimeout)
			defer cancel()
			if err := r.opts.Jobs.Cancel(ctx, w.name); err != nil {
				down.Store(true)
				r.opts.Logger.Warn("job not withdrawn", "operation", w.name, "error", err)
				r.again(w)
			}
			// An operation of that name was begun anew in the meantime, and its
			// job may have been the one that was withdrawn.
			r.tell(w.name, Event{Kind: Withdrawn})
			return nil
		})
	}
	_ = group.Wait() // each has told its error
}

// again has w tried again, if it is worth it.
func (r *Registry) again(w withdrawal) {
	now := time.Now()
	if !now.Before(w.until) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.failed) == 0 {
		r.retryAt = now.Add(withdrawRetry)
		r.arm(r.retryAt)
	}
	r.failed = append(r.failed, w)
}

// retry has Run withdraw once more what could not be withdrawn, unless clients
// wait for it again. The mutex is held.
func (r *Registry) retry(now time.Time) {
	if len(r.failed) == 0 {
		return
	}
	if now.Before(r.retryAt) {
		r.arm(r.retryAt)
		return
	}
	for _, w := range r.failed {
		if r.job(w.name) == nil {
			r.withdrawals = append(r.withdrawals, w)
		}
	}
	r.failed = nil
}
