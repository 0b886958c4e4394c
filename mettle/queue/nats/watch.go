package nats

import (
	"context"
	"time"
)

// A watch is on a job that was published here. When its worker dies, the next one
// that asks for jobs finds out. Where none asks, because there is no other in that
// pool, the API server that the job reports to finds out itself.
type watch struct {
	api     string
	asked   bool      // it was published here, rather than by an API server of that name before us
	pending bool      // the broker has yet to confirm that it has the job
	attempt uint32    // the last that was heard of
	due     time.Time // when to look at the record, if a worker has it
}

// maxPublished bounds Queue.published, and so Queue.watched. A job beyond it is
// found by the workers only.
const maxPublished = 1 << 20

// watchAfter is when an API server looks at a lease that has not been renewed, in
// lease times: later than any worker would.
const watchAfter = 2

// expect notes that an API server waits for the end of a job that is about to be
// published. Published is called with how that went: where it failed, the job is not
// expected any more, unless it was before.
func (q *Queue) expect(api, operation string) (published func(error)) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if api == "" {
		return func(error) {}
	}
	w := q.expectLocked(api, operation)
	if w == nil || w.asked {
		return func(error) {}
	}
	w.asked, w.pending = true, true
	return func(err error) {
		if err != nil {
			q.unexpect(operation)
			return
		}
		q.mu.Lock()
		w.pending = false
		q.mu.Unlock()
	}
}

// expectLocked is expect with mu held. It returns nil where there are too many.
func (q *Queue) expectLocked(api, operation string) *watch {
	w := q.published[operation]
	if w == nil && len(q.published) < maxPublished {
		w = &watch{api: api}
		q.published[operation] = w
	}
	return w
}

// watch has the record of a job be looked at when its lease should have lapsed.
func (q *Queue) watch(api, operation string, attempt uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if w := q.expectLocked(api, operation); w != nil {
		w.attempt, w.due = max(w.attempt, attempt), time.Now().Add(watchAfter*q.opts.LeaseTime)
		q.watched[operation] = w
	}
}

// unwatch is for a job that no worker has any more.
func (q *Queue) unwatch(operation string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.watched, operation)
}

// unexpect is for a job whose end nobody waits for any more.
func (q *Queue) unexpect(operation string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.watched, operation)
	delete(q.published, operation)
}

// noteAfter is how long after the beginning of a lease the API servers are told of
// it, so that they watch. Most workers have reported by then, which tells as much.
const noteAfter = 100 * time.Millisecond

// noteClaim tells the API servers of a job that a worker has it. Where that is
// lost, a worker still finds out if the lease lapses.
func (l *lease) noteClaim() {
	leave, err := l.q.enter()
	if err != nil {
		return
	}
	defer leave()
	l.mu.Lock()
	r := l.record
	l.mu.Unlock()
	for _, api := range r.Replies {
		if err := l.q.nc.Publish(l.q.noteSubject(api), []byte(r.Operation)); err != nil {
			l.q.log.Debug("an API server could not be told of a claim", "operation", r.Operation, "error", err)
		}
	}
}

// look looks at the leases that should have lapsed, until ctx is done.
func (q *Queue) look(ctx context.Context, api string) {
	check := time.NewTicker(max(q.opts.LeaseTime/4, 100*time.Millisecond))
	defer check.Stop()
	for {
		select {
		case <-check.C:
			for _, operation := range q.due(api) {
				q.lookAt(ctx, operation)
			}
		case <-ctx.Done():
			return
		}
	}
}

// maxDue bounds how many records are looked at at a time.
const maxDue = 1000

// due are the jobs of an API server whose lease should have lapsed.
func (q *Queue) due(api string) []string {
	now := time.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	var due []string
	for operation, w := range q.watched {
		if w.api == api && now.After(w.due) {
			due = append(due, operation)
			if len(due) == maxDue {
				break
			}
		}
	}
	return due
}

// lookAt looks whether a lease has lapsed, and does then what a worker would.
func (q *Queue) lookAt(ctx context.Context, operation string) {
	s, err := q.load(ctx, operation)
	if err != nil {
		q.log.Warn("could not look at the record of a lease", "operation", operation, "error", err)
		return
	}
	if s.State != stateLeased {
		if err := q.endLost(ctx, operation); err != nil {
			q.log.Warn("could not look after a job", "operation", operation, "error", err)
			return
		}
		q.unwatch(operation) // whoever takes it next says so
		return
	}
	q.mu.Lock()
	due := time.Now().Add(q.clock.until(s.written.Add(watchAfter * q.opts.LeaseTime)))
	if q.graceUntil.After(due) {
		due = q.graceUntil
	}
	if w := q.watched[operation]; w != nil && time.Now().Before(due) {
		w.due = due
		q.mu.Unlock()
		return
	}
	q.mu.Unlock()
	if err := q.lapse(ctx, s); err != nil {
		q.log.Warn("could not end a lapsed lease", "operation", operation, "error", err) // tried again soon
		return
	}
	q.unwatch(operation)
}

// lapse ends a lease whose worker is silent.
func (q *Queue) lapse(ctx context.Context, s stored) error {
	r := s.clone()
	if r.cancelled() {
		r.State = stateEnded
		if _, err := q.store(ctx, r, s.revision); err != nil {
			return err
		}
		q.tell(ctx, r.Replies, ended(r))
		return q.deleteJob(ctx, r.Job)
	}
	lapsed := s.record
	r.endAttempt("fell silent")
	q.metrics.lapsed.Inc()
	q.log.Warn("lease lapsed", "operation", r.Operation, "worker", r.Worker, "attempt", r.Attempt)
	if r.usedUp(q.opts.MaxAttempts) {
		return q.endUsedUp(ctx, r, s.revision, nil)
	}
	if _, err := q.store(ctx, r, s.revision); err != nil {
		return err
	}
	q.tell(ctx, r.Replies, requeued(lapsed))
	return nil
}
