package pubsub

import (
	"context"
	"fmt"
	"slices"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// pollTime bounds a pull that waits. The broker ends most of them earlier.
	pollTime = 90 * time.Second
	// maxPull bounds the messages of one pull.
	maxPull = 100
	// pullTries is how many times in a row a pull fails before the consumers
	// that wait hear of it.
	pullTries = 5
	// maxRounds bounds the rounds of looking under way for one station, and
	// maxPulls the pulls that wait at one source. Who comes meanwhile is looked
	// for together with the others.
	maxRounds = 4
	maxPulls  = 4
	// emptyTime is how long pulls must have waited for nothing for a
	// subscription to be taken as empty: longer than a message that is there
	// needs to come.
	emptyTime = 100 * time.Millisecond
)

// askFor has somebody look for a job for w: a round, or the pulls that wait
// where there is nothing to look into or no order to keep. It returns what is
// to be started. The mutex is held.
func (q *Queue) askFor(st *station, w *waiter) []func(context.Context) {
	if len(st.sources) == 1 || st.isEmpty() {
		return q.poll(st, []*waiter{w})
	}
	st.fresh = append(st.fresh, w)
	if st.rounds == maxRounds {
		return nil
	}
	st.rounds++
	return []func(context.Context){func(ctx context.Context) { q.look(ctx, st) }}
}

// isEmpty reports whether pulls wait at all sources and bring nothing. The mutex
// is held.
func (st *station) isEmpty() bool {
	return !slices.ContainsFunc(st.sources, func(s *source) bool { return !s.isEmpty() })
}

func (s *source) isEmpty() bool {
	return s.pulls > 0 && !s.empty.IsZero() && time.Since(s.empty) >= emptyTime
}

// look makes rounds for as long as somebody comes: it takes what is there from
// one source after the other, and has pulls wait for those who got nothing.
func (q *Queue) look(ctx context.Context, st *station) {
	for {
		q.mu.Lock()
		batch := st.fresh
		st.fresh = nil
		if len(batch) == 0 || ctx.Err() != nil {
			st.rounds--
			q.mu.Unlock()
			return
		}
		q.mu.Unlock()
		for _, s := range st.sources {
			n, empty := q.stillWaiting(batch, s)
			if n == 0 {
				break
			}
			if empty {
				continue
			}
			// An error is told by the pulls that wait.
			messages, _ := q.pull(ctx, s.subscription, min(n, maxPull), 0)
			for _, m := range messages {
				q.deliver(s, m)
			}
		}
		q.mu.Lock()
		begin := q.poll(st, batch)
		q.mu.Unlock()
		for _, f := range begin {
			q.start(f)
		}
	}
}

// stillWaiting counts those of a batch that got nothing yet, and reports whether
// s has nothing for them.
func (q *Queue) stillWaiting(batch []*waiter, s *source) (n int, empty bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, w := range batch {
		if !w.left {
			n++
		}
	}
	return n, s.isEmpty()
}

// poll returns the pulls that are to wait for some consumers more. The mutex is
// held.
func (q *Queue) poll(st *station, batch []*waiter) []func(context.Context) {
	waits := false
	for _, w := range batch {
		w.polling = true
		waits = waits || !w.left
	}
	if !waits {
		return nil
	}
	var begin []func(context.Context)
	for _, s := range st.sources {
		if n := s.demand(); n > 0 && s.pulls < maxPulls {
			s.asked += n
			s.pulls++
			begin = append(begin, func(ctx context.Context) { q.pullFor(ctx, s, n) })
		}
	}
	return begin
}

// demand is how many messages are to be asked for. The mutex is held.
func (s *source) demand() int {
	n := 0
	for _, w := range s.waiters {
		if w.polling {
			n++
		}
	}
	return min(n-s.asked, maxPull)
}

// pullFor pulls, n messages at first, for as long as consumers wait that no
// other pull is for.
func (q *Queue) pullFor(ctx context.Context, s *source, n int) {
	for failed, made := 0, false; ; {
		q.waits(s)
		messages, err := q.pull(ctx, s.subscription, n, pollTime)
		q.brought(s, len(messages) > 0 || err != nil)
		for _, m := range messages {
			q.deliver(s, m)
		}
		switch code := status.Code(err); {
		case err == nil:
			failed = 0
		case ctx.Err() != nil:
			return
		case code == codes.NotFound && !made:
			made = true
			if err := q.makePool(ctx, s); err != nil {
				q.fail(s, n, err)
				return
			}
		case !isTransient(code) || failed >= pullTries:
			q.fail(s, n, q.classify(ctx, target{"pull", s.subscription, "pubsub.subscriptions.consume"}, err))
			return
		default:
			failed++
			if !backOff(ctx, failed) {
				return
			}
		}
		q.mu.Lock()
		s.asked -= n
		n = s.demand()
		if n <= 0 {
			s.pulls--
			q.mu.Unlock()
			return
		}
		s.asked += n
		q.mu.Unlock()
	}
}

// waits notes that a pull begins to wait, and brought what comes of it.
func (q *Queue) waits(s *source) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if s.empty.IsZero() {
		s.empty = time.Now()
	}
}

func (q *Queue) brought(s *source, something bool) {
	if something {
		q.mu.Lock()
		defer q.mu.Unlock()
		s.empty = time.Time{}
	}
}

// fail tells those who wait that pulling does not work.
func (q *Queue) fail(s *source, n int, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	s.asked -= n
	s.pulls--
	for _, w := range slices.Clone(s.waiters) {
		if w.polling {
			q.forget(w)
			w.answer <- answer{err: err}
		}
	}
}

// makePool makes the subscription of a pool that has just come up, if this worker
// may. Unlike one that Setup makes, it goes when nobody has read it for 31 days.
func (q *Queue) makePool(ctx context.Context, s *source) error {
	sub := q.poolSubscription(s.pool, s.band)
	sub.ExpirationPolicy = nil // the service's own: 31 days
	if err := q.makeSubscription(ctx, sub); err != nil {
		return fmt.Errorf("the pool %q has no subscription, and this worker can't make it; run mettle setup --pools %s: %w", s.pool, s.pool, err)
	}
	q.log.Warn("a subscription was lacking and was made; mettle setup makes it for good", "subscription", s.subscription, "pool", s.pool)
	return nil
}

// pull makes one call, which waits for a message for up to the given time. It
// is not cut off when consumers leave: a message that is on its way then would
// have to lapse.
func (q *Queue) pull(ctx context.Context, name string, n int, wait time.Duration) ([]*pb.ReceivedMessage, error) {
	timeout := wait
	if wait == 0 {
		timeout = q.opts.CallTimeout / 3
	}
	try, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	res, err := q.subs.Pull(try, &pb.PullRequest{
		Subscription: name, MaxMessages: int32(n), //nolint:gosec // small
		ReturnImmediately: wait == 0, //nolint:staticcheck // the one way to ask one band after the other
	})
	if status.Code(err) == codes.DeadlineExceeded && wait > 0 {
		return nil, nil
	}
	return res.GetReceivedMessages(), err
}
