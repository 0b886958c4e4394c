package nats

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/genproto/googleapis/rpc/code"
	spb "google.golang.org/genproto/googleapis/rpc/status"
)

// A broker that lost what it had, because it keeps it in memory or its disk was
// emptied, is given its streams and consumers again. And nobody waits for ever for
// a job that is gone, or for the end of one that has ended: where the final update
// did not arrive, the client is told to ask again, and finds the result in the
// ActionCache, or has the action run once more.

// mendRetry is how long to wait between tries to make what is lacking.
const mendRetry = time.Second

// mend looks after each new connection whether what we need is still there, and now
// and then what time it is there, until ctx is done.
func (q *Queue) mend(ctx context.Context) {
	reconnected, server := q.reconnection(), q.nc.ConnectedServerId()
	clock := time.NewTicker(setEvery)
	defer clock.Stop()
	for {
		select {
		case <-reconnected:
		case <-clock.C:
			if err := q.setClock(ctx); err != nil {
				q.log.Debug("could not ask the broker what time it is", "error", err)
			}
			continue
		case <-q.done:
			return
		}
		reconnected = q.reconnection() // what comes from here on is looked at again
		for {
			// A server that was started again has another id. If it is alone, what it had
			// not brought to its disk may be gone.
			now := q.nc.ConnectedServerId()
			err := q.restore(ctx, now != server && q.nc.ConnectedClusterName() == "")
			if err == nil || ctx.Err() != nil {
				server = now
				break
			}
			q.log.Warn("could not look whether the broker has kept what it had", "error", err)
			if q.pause(ctx, mendRetry) != nil {
				return
			}
		}
	}
}

// restore makes what is lacking: first all that takes updates, so that none is
// lost when jobs can be had again. Where the broker was started again, it may lack
// the last of what it had.
func (q *Queue) restore(ctx context.Context, restarted bool) error {
	streams := q.streams()
	if err := q.restoreStream(ctx, streams[2].config); err != nil {
		return err
	}
	q.mu.Lock()
	var apis []string
	for api := range q.inboxes {
		apis = append(apis, api)
	}
	q.mu.Unlock()
	var lost []string
	for _, api := range apis {
		made, err := q.restoreInbox(ctx, api)
		if err != nil {
			return err
		}
		if made || restarted {
			lost = append(lost, api)
		}
	}
	for _, s := range streams[:2] {
		if err := q.restoreStream(ctx, s.config); err != nil {
			return err
		}
	}
	for _, api := range lost {
		q.audit(ctx, api)
	}
	return q.setClock(ctx)
}

func (q *Queue) restoreStream(ctx context.Context, config jetstream.StreamConfig) error {
	return q.try(ctx, callSetup, func(ctx context.Context) error {
		_, err := q.js.Stream(ctx, config.Name)
		if !errors.Is(err, jetstream.ErrStreamNotFound) || q.opts.MustExist {
			return err
		}
		q.log.Error("the broker has lost a stream, making it again", "stream", config.Name)
		_, err = q.js.CreateOrUpdateStream(ctx, config)
		return err
	})
}

// restoreInbox reports whether the consumer of an API server's updates had to be
// made again.
func (q *Queue) restoreInbox(ctx context.Context, api string) (made bool, err error) {
	_, err = q.findInbox(ctx, api)
	if !errors.Is(err, jetstream.ErrConsumerNotFound) {
		return false, err
	}
	_, err = q.makeInbox(ctx, api)
	return true, err
}

// auditors is how many jobs are looked after at once.
const auditors = 16

// audit looks after all jobs that an API server has published and that have not
// ended, because they, or updates about them, may have been lost.
func (q *Queue) audit(ctx context.Context, api string) {
	q.mu.Lock()
	var operations []string
	for operation, w := range q.published {
		if w.api == api && !w.pending {
			operations = append(operations, operation)
		}
	}
	q.mu.Unlock()
	q.log.Warn("the broker may have lost something, looking after the jobs that have not ended", "api", api, "jobs", len(operations))
	next := make(chan string)
	var workers sync.WaitGroup
	for range auditors {
		workers.Go(func() {
			for operation := range next {
				if err := q.endLost(ctx, operation); err != nil {
					q.log.Warn("could not look after a job", "operation", operation, "error", err)
				}
			}
		})
	}
	for _, operation := range operations {
		if ctx.Err() != nil {
			break // its own calls end with it too
		}
		next <- operation
	}
	close(next)
	workers.Wait()
}

// endLost ends a job of ours that the queue doesn't have any more.
func (q *Queue) endLost(ctx context.Context, operation string) error {
	q.mu.Lock()
	w := q.published[operation]
	asked := w != nil && w.asked
	if w != nil && !asked {
		delete(q.published, operation)
	}
	q.mu.Unlock()
	if !asked {
		return nil // it has ended meanwhile, or nobody here waits for it
	}
	m, err := q.jobMessage(ctx, operation)
	if err != nil && !errors.Is(err, errNoMessage) {
		return err
	}
	s, loadErr := q.load(ctx, operation)
	if loadErr != nil {
		return loadErr
	}
	if err == nil && (s.State != stateEnded || m.Sequence > s.Job) {
		return nil // it is there
	}
	q.mu.Lock()
	s.Attempt = max(s.Attempt, w.attempt, 1)
	q.mu.Unlock()
	q.log.Warn("the end of a job did not arrive", "operation", operation, "attempt", s.Attempt)
	q.metrics.endsLost.Inc()
	// By way of the broker: if the end is still on its way, it comes before.
	err = q.post(ctx, []string{w.api}, failed(s.record, unavailable("the result did not arrive; it may be in the ActionCache")))
	if err != nil {
		return fmt.Errorf("tell of a lost end: %w", err)
	}
	return nil
}

// unavailable has a client ask again.
func unavailable(why string) *spb.Status {
	return &spb.Status{Code: int32(code.Code_UNAVAILABLE), Message: why}
}
