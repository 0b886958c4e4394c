package nats

import (
	"context"
	"errors"
	"fmt"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/mettle-build/mettle/mettle/queue"
)

const (
	// recordAge is how long the record of a lease is kept that nobody renews.
	recordAge = 24 * time.Hour
	// maxWaiting bounds the requests for jobs that wait at the broker, for each
	// band of each pool: a fleet of 65,536 idle slots.
	maxWaiting = 1 << 16
	// resendAfter is when an update comes again whose handling nobody confirmed,
	// as where the API server's connection was lost with it.
	resendAfter = 10 * time.Second
	// maxPerOperation bounds the updates about one operation that one API server
	// has yet to fetch. Three an attempt are usual.
	maxPerOperation = 64
)

// Setup makes or updates what is needed at the broker: the streams, and the
// consumers of the pools. It may be run again at any time, and keeps what is in
// the queue. Where a right is lacking, the error names it.
func Setup(ctx context.Context, o Options, pools ...string) error {
	q, err := connect(ctx, o)
	if err != nil {
		return err
	}
	defer q.Close() //nolint:errcheck // there is nothing to lose
	if err := q.setup(ctx); err != nil {
		return q.refusedOr(err)
	}
	for _, pool := range pools {
		for b := range bands {
			if err := q.makeConsumer(ctx, pool, b); err != nil {
				return q.refusedOr(err)
			}
		}
	}
	return nil
}

// setup makes the streams, or changes them to what our settings say.
func (q *Queue) setup(ctx context.Context) error {
	for _, s := range q.streams() {
		if err := q.makeStream(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

func (q *Queue) makeStream(ctx context.Context, s stream) error {
	err := q.try(ctx, callSetup, func(ctx context.Context) (err error) {
		*s.to, err = q.js.CreateOrUpdateStream(ctx, s.config)
		return err
	})
	if err != nil {
		return fmt.Errorf("make the stream %s, which takes the right to publish to $JS.API.STREAM.CREATE.%[1]s and "+
			"$JS.API.STREAM.UPDATE.%[1]s: %w", s.config.Name, err)
	}
	return nil
}

// find looks for the streams, and makes those that are not there, unless MustExist
// is set. It leaves the others as they are: who was started without the settings of
// the others must not take the copies away that a cluster has of all jobs.
func (q *Queue) find(ctx context.Context) error {
	for _, s := range q.streams() {
		err := q.try(ctx, callSetup, func(ctx context.Context) (err error) {
			*s.to, err = q.js.Stream(ctx, s.config.Name)
			return err
		})
		if errors.Is(err, jetstream.ErrStreamNotFound) && !q.opts.MustExist {
			if err := q.makeStream(ctx, s); err != nil {
				return err
			}
			continue
		}
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return fmt.Errorf("the broker has no stream %s, run mettle setup: %w: %w: %w", s.config.Name, queue.ErrUnavailable, queue.ErrRefused, err)
		}
		if err != nil {
			return fmt.Errorf("look for the stream %s, which takes the right to publish to $JS.API.STREAM.INFO.%[1]s: %w",
				s.config.Name, err)
		}
	}
	return nil
}

// A stream is one that we need, and where to put it.
type stream struct {
	config jetstream.StreamConfig
	to     *jetstream.Stream
}

func (q *Queue) streams() []stream {
	base := jetstream.StreamConfig{Replicas: q.opts.Replicas, MaxBytes: q.opts.MaxBytes, Storage: jetstream.FileStorage}
	if q.opts.Memory {
		base.Storage = jetstream.MemoryStorage
	}
	jobs, leases, updates := base, base, base

	// A job's message is there until the job has ended. There is one a name:
	// a second is refused.
	jobs.Name, jobs.Subjects = q.jobsStream(), []string{q.opts.Prefix + ".jobs.>"}
	jobs.Description = "jobs that wait for a worker or are with one"
	jobs.Retention, jobs.Discard = jetstream.WorkQueuePolicy, jetstream.DiscardNew
	jobs.MaxMsgsPerSubject, jobs.DiscardNewPerSubject = 1, true
	jobs.MaxMsgs = int64(q.opts.MaxJobs)

	// The newest record of each. One that was refused for want of room would
	// be worse than a full disk, so it has no bound of its own but age.
	leases.Name, leases.Subjects = q.leasesStream(), []string{q.opts.Prefix + ".leases.*"}
	leases.Description = "who has which job"
	leases.MaxMsgsPerSubject, leases.AllowMsgTTL, leases.MaxAge = 1, true, recordAge
	leases.Discard, leases.MaxBytes = jetstream.DiscardOld, -1

	// An update goes where no API server waits for it, or it has been fetched.
	updates.Name, updates.Subjects = q.updatesStream(), []string{q.opts.Prefix + ".updates.>"}
	updates.Description = "updates that API servers have yet to fetch"
	updates.Retention, updates.Discard = jetstream.InterestPolicy, jetstream.DiscardOld
	updates.MaxAge, updates.MaxMsgsPerSubject = q.opts.UpdatesAge, maxPerOperation
	updates.Duplicates = min(2*time.Minute, q.opts.UpdatesAge)

	return []stream{{jobs, &q.jobs}, {leases, &q.leases}, {updates, &q.updates}}
}

// ensureConsumer makes the consumer of a band of a pool, once a connection.
func (q *Queue) ensureConsumer(ctx context.Context, pool string, b int) error {
	name := consumerName(pool, b)
	q.mu.Lock()
	known := q.consumers[name]
	q.mu.Unlock()
	if known {
		return nil
	}
	if err := q.makeConsumer(ctx, pool, b); err != nil {
		return err
	}
	q.mu.Lock()
	q.consumers[name] = true
	q.mu.Unlock()
	return nil
}

// forgetConsumer has it made again: the broker doesn't seem to have it.
func (q *Queue) forgetConsumer(pool string, b int) {
	q.mu.Lock()
	delete(q.consumers, consumerName(pool, b))
	q.mu.Unlock()
}

func (q *Queue) makeConsumer(ctx context.Context, pool string, b int) error {
	config := jetstream.ConsumerConfig{
		Durable:       consumerName(pool, b),
		FilterSubject: q.poolSubject(pool, b, "*"),
		AckPolicy:     jetstream.AckExplicitPolicy,
		AckWait:       q.opts.LeaseTime,
		MaxDeliver:    -1, // we count attempts ourselves
		MaxAckPending: -1, // as many as there are workers
		MaxWaiting:    maxWaiting,
	}
	err := q.try(ctx, callSetup, func(ctx context.Context) error {
		// Most find it there as it should be, and need no right to change it.
		if c, err := q.jobs.Consumer(ctx, config.Durable); err == nil && c.CachedInfo().Config.AckWait == config.AckWait {
			return nil
		}
		_, err := q.jobs.CreateOrUpdateConsumer(ctx, config)
		return err
	})
	if err != nil {
		return fmt.Errorf("make the consumer %s of the stream %s, which takes the right to publish to $JS.API.CONSUMER.CREATE.%[2]s.>: %w",
			config.Durable, q.jobsStream(), err)
	}
	return nil
}

// maxInboxes bounds the API servers that one Queue publishes for: one, but for tests.
const maxInboxes = 1024

// ensureInbox makes the consumer of an API server's updates, so that from its
// first job on none is lost.
func (q *Queue) ensureInbox(ctx context.Context, api string) error {
	if api == "" || q.knowsInbox(api) {
		return nil
	}
	select { // one at a time
	case q.making <- struct{}{}:
		defer func() { <-q.making }()
	case <-ctx.Done():
		return ctx.Err()
	case <-q.done:
		return queue.ErrClosed
	}
	if q.knowsInbox(api) {
		return nil
	}
	if _, err := q.makeInbox(ctx, api); err != nil {
		return err
	}
	if _, err := q.nc.Subscribe(q.noteSubject(api), func(m *natsgo.Msg) { q.watch(api, string(m.Data), 0) }); err != nil {
		return q.classify(err)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.inboxes) < maxInboxes {
		q.inboxes[api] = true
	}
	return nil
}

func (q *Queue) knowsInbox(api string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.inboxes[api]
}

// inbox finds the consumer of an API server's updates, or makes it: the broker
// forgets one that nobody has fetched from for Options.UpdatesAge.
// It reports whether one that had been made was gone.
func (q *Queue) inbox(ctx context.Context, api string) (c jetstream.Consumer, lost bool, err error) {
	if err := q.ensureInbox(ctx, api); err != nil {
		return nil, false, err
	}
	c, err = q.findInbox(ctx, api)
	if !errors.Is(err, jetstream.ErrConsumerNotFound) {
		return c, false, err
	}
	c, err = q.makeInbox(ctx, api)
	return c, true, err
}

func (q *Queue) findInbox(ctx context.Context, api string) (c jetstream.Consumer, err error) {
	err = q.try(ctx, callSetup, func(ctx context.Context) (err error) {
		c, err = q.updates.Consumer(ctx, inboxName(api))
		return err
	})
	return c, err
}

func (q *Queue) makeInbox(ctx context.Context, api string) (c jetstream.Consumer, err error) {
	config := jetstream.ConsumerConfig{
		Durable:       inboxName(api),
		FilterSubject: q.opts.Prefix + ".updates." + token(api) + ".*",
		// Each by itself: what was under way when a connection was lost comes after
		// what is newer, and must not be acknowledged with that.
		AckPolicy:         jetstream.AckExplicitPolicy,
		AckWait:           resendAfter,
		MaxDeliver:        -1,
		MaxAckPending:     -1,
		InactiveThreshold: q.opts.UpdatesAge,
	}
	err = q.try(ctx, callSetup, func(ctx context.Context) (err error) {
		c, err = q.updates.CreateOrUpdateConsumer(ctx, config)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make the consumer %s of the stream %s, which takes the right to publish to $JS.API.CONSUMER.CREATE.%[2]s.>: %w",
			config.Durable, q.updatesStream(), err)
	}
	return c, nil
}
