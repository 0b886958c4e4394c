package pubsub

import (
	"context"
	"errors"
	"fmt"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// What processes make for themselves is gone a day after they are; the service
// takes no less. Updates wait for an API server that can't reach the broker.
func soon() *pb.ExpirationPolicy {
	return &pb.ExpirationPolicy{Ttl: durationpb.New(24 * time.Hour)}
}

func shortRetention() *durationpb.Duration { return durationpb.New(time.Hour) }

// jobRetention is how long a job waits for a worker. Its client has gone by then.
const jobRetention = 24 * time.Hour

// deadLetterAttempts is far above the attempts that workers allow, so that they
// are the ones to end a job: they can tell more of it. The service takes 5 to 100.
func (o Options) deadLetterAttempts() int32 {
	return int32(min(max(2*o.MaxAttempts+4, 5), 100)) //nolint:gosec // in bounds
}

// Setup makes the topics and the subscriptions that all processes share, those
// of Options.Pools among them, and changes those that are there and differ. It
// may run again at any time. It does not remove anything. It logs what it makes
// and changes, and goes on after an error, so that what it returns names all the
// rights that are lacking.
func (q *Queue) Setup(ctx context.Context) error {
	w := &work{q: q}
	var err error
	for _, name := range []string{"dead", "jobs", "updates", "cancel", "notices"} {
		err = errors.Join(err, w.ensureTopic(ctx, q.topic(name)))
	}
	err = errors.Join(err, w.ensureSubscription(ctx, &pb.Subscription{
		Name: q.deadSubscription(), Topic: q.topic("dead"), AckDeadlineSeconds: newsDeadline,
		MessageRetentionDuration: durationpb.New(jobRetention), ExpirationPolicy: &pb.ExpirationPolicy{},
	}))
	for _, pool := range q.opts.Pools {
		for _, band := range q.opts.bands() {
			err = errors.Join(err, w.ensureSubscription(ctx, q.poolSubscription(pool, band)))
		}
	}
	if err != nil {
		return fmt.Errorf("set up Pub/Sub: %w", err)
	}
	q.log.Info("the topics and subscriptions are set up", "topics", w.topics, "subscriptions", w.subscriptions, "made", w.made, "changed", w.changed,
		"hint", "dead letters need Pub/Sub's own service agent to be allowed to publish to the topic and to read the subscriptions of jobs")
	return nil
}

// work is what Setup has looked at and done.
type work struct {
	q                                    *Queue
	topics, subscriptions, made, changed int
}

// poolSubscription is the subscription to the jobs of a pool and a band.
func (q *Queue) poolSubscription(pool, band string) *pb.Subscription {
	return &pb.Subscription{
		Name: q.jobSubscription(pool, band), Topic: q.topic("jobs"), Filter: jobFilter(pool, band),
		AckDeadlineSeconds:       int32(q.opts.LeaseTime / time.Second), //nolint:gosec // up to 600
		MessageRetentionDuration: durationpb.New(jobRetention), ExpirationPolicy: &pb.ExpirationPolicy{},
		DeadLetterPolicy: &pb.DeadLetterPolicy{DeadLetterTopic: q.topic("dead"), MaxDeliveryAttempts: q.opts.deadLetterAttempts()},
	}
}

func (w *work) ensureTopic(ctx context.Context, name string) error {
	q := w.q
	w.topics++
	found := true
	err := q.call(ctx, target{"look at the topic", name, "pubsub.topics.get"}, func(ctx context.Context) error {
		_, err := q.topics.GetTopic(ctx, &pb.GetTopicRequest{Topic: name})
		found = status.Code(err) != codes.NotFound
		return ifNot(codes.NotFound, err)
	})
	if err != nil || found {
		return err
	}
	err = q.call(ctx, target{"make the topic", name, "pubsub.topics.create"}, func(ctx context.Context) error {
		_, err := q.topics.CreateTopic(ctx, &pb.Topic{Name: name})
		return ifNot(codes.AlreadyExists, err)
	})
	if err == nil {
		w.made++
		q.log.Info("a topic was made", "topic", name)
	}
	return err
}

// ensureSubscription makes a subscription, or changes it where it differs.
func (w *work) ensureSubscription(ctx context.Context, want *pb.Subscription) error {
	q := w.q
	w.subscriptions++
	var have *pb.Subscription
	err := q.call(ctx, target{"look at the subscription", want.GetName(), "pubsub.subscriptions.get"}, func(ctx context.Context) (err error) {
		have, err = q.subs.GetSubscription(ctx, &pb.GetSubscriptionRequest{Subscription: want.GetName()})
		return ifNot(codes.NotFound, err)
	})
	switch {
	case err != nil:
		return err
	case have == nil:
		err := q.makeSubscription(ctx, want)
		if err == nil {
			w.made++
			q.log.Info("a subscription was made", "subscription", want.GetName())
		}
		return err
	case have.GetTopic() == want.GetTopic() && have.GetFilter() == "" && want.GetFilter() != "" && q.emulated():
		q.log.Warn("the emulator does not filter, so each subscription has all messages", "subscription", want.GetName())
	case have.GetTopic() != want.GetTopic() || have.GetFilter() != want.GetFilter():
		return fmt.Errorf("the subscription %s is of the topic %s with the filter %q, not of %s with %q: Pub/Sub can't change that; delete it and run mettle setup again",
			want.GetName(), have.GetTopic(), have.GetFilter(), want.GetTopic(), want.GetFilter())
	}
	paths := differences(have, want)
	if len(paths) == 0 {
		return nil
	}
	able := true
	err = q.call(ctx, target{"change the subscription", want.GetName(), "pubsub.subscriptions.update"}, func(ctx context.Context) error {
		_, err := q.subs.UpdateSubscription(ctx, &pb.UpdateSubscriptionRequest{Subscription: want, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths}})
		if c := status.Code(err); q.emulated() && (c == codes.Unimplemented || c == codes.InvalidArgument) {
			able = false
			return nil
		}
		return err
	})
	switch {
	case err != nil:
		return err
	case !able:
		q.log.Warn("the emulator can't change a subscription, which is left as it is", "subscription", want.GetName(), "fields", paths)
	default:
		w.changed++
		q.log.Info("a subscription was changed", "subscription", want.GetName(), "fields", paths)
	}
	return nil
}

// emulated reports whether the broker is an emulator, of which not everything
// can be asked.
func (q *Queue) emulated() bool { return q.opts.Endpoint != "" }

// differences lists the fields, of those that Setup decides, in which a
// subscription is not as it should be.
func differences(have, want *pb.Subscription) []string {
	var paths []string
	if have.GetAckDeadlineSeconds() != want.GetAckDeadlineSeconds() {
		paths = append(paths, "ack_deadline_seconds")
	}
	if !proto.Equal(have.GetMessageRetentionDuration(), want.GetMessageRetentionDuration()) {
		paths = append(paths, "message_retention_duration")
	}
	if have.GetExpirationPolicy() == nil || have.GetExpirationPolicy().GetTtl().AsDuration() != want.GetExpirationPolicy().GetTtl().AsDuration() {
		paths = append(paths, "expiration_policy")
	}
	if !proto.Equal(have.GetDeadLetterPolicy(), want.GetDeadLetterPolicy()) {
		paths = append(paths, "dead_letter_policy")
	}
	if have.GetRetryPolicy() != nil {
		paths = append(paths, "retry_policy") // what is handed back is to come at once
	}
	return paths
}

// makeSubscription makes a subscription that may be there already.
func (q *Queue) makeSubscription(ctx context.Context, s *pb.Subscription) error {
	t := target{"make the subscription " + s.GetName(), s.GetTopic(), "pubsub.subscriptions.create or pubsub.topics.attachSubscription"}
	return q.call(ctx, t, func(ctx context.Context) error {
		_, err := q.subs.CreateSubscription(ctx, s)
		return ifNot(codes.AlreadyExists, err)
	})
}

// dropSubscription removes one of this process's own. If that fails, it expires.
func (q *Queue) dropSubscription(ctx context.Context, name string) {
	err := q.subs.DeleteSubscription(ctx, &pb.DeleteSubscriptionRequest{Subscription: name})
	if err != nil {
		q.log.Debug("a subscription was left to expire", "subscription", name, "error", err)
	}
}

// ifNot is err, unless it is of the code that is as good as none.
func ifNot(c codes.Code, err error) error {
	if status.Code(err) == c {
		return nil
	}
	return err
}
