package pubsub

import (
	"context"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A feed is a subscription whose messages are handled as they come, one at a
// time: news, which need no lease.
type feed struct {
	subscription string
	// remake makes the subscription when it has gone. Nil: it is not this
	// process's own, and is waited for.
	remake func(ctx context.Context) error
	// handle returns false if the message is to come again.
	handle func(ctx context.Context, m *pb.PubsubMessage) bool
}

const (
	// maxUnacked bounds the messages that the broker sends ahead, and
	// maxUnackedBytes what they take.
	maxUnacked      = 1000
	maxUnackedBytes = 32 << 20
	// newsDeadline is how long the broker waits for their acknowledgement, and
	// so how late news comes that was on a stream when it broke. The service
	// takes no less. What comes twice is dropped.
	newsDeadline = 10 // seconds
	// maxSilence is how long a stream may say nothing: then it is opened anew,
	// because one that is dead is silent as well.
	maxSilence = 2 * time.Minute
	// exhaustedWait is how long a quota is left alone that was used up.
	exhaustedWait = 30 * time.Second
)

// receive handles what comes until ctx is done.
func (q *Queue) receive(ctx context.Context, f feed) {
	for n := 0; ctx.Err() == nil; n++ {
		got, err := q.stream(ctx, f)
		if ctx.Err() != nil {
			return
		}
		q.metrics.reconnected.Inc()
		if got {
			n = 0
		}
		code := status.Code(err)
		switch {
		case code == codes.NotFound && f.remake != nil:
			q.log.Error("a subscription has gone, what was sent meanwhile is lost; it is made anew", "subscription", f.subscription)
			err := f.remake(ctx)
			if err != nil && ctx.Err() == nil {
				q.log.Error("a subscription could not be made", "subscription", f.subscription, "error", err)
			}
			if status.Code(err) == codes.ResourceExhausted && !sleep(ctx, exhaustedWait) {
				return
			}
		case !isTransient(code) && code != codes.OK && code != codes.Canceled:
			q.log.Error("a subscription can't be read", "subscription", f.subscription, "error", err)
			n = max(n, 5)
		default:
			q.log.Debug("a stream has ended, it is opened again", "subscription", f.subscription, "error", err)
		}
		if !backOff(ctx, n) {
			return
		}
	}
}

// stream reads one stream to its end, and reports whether it brought anything.
func (q *Queue) stream(ctx context.Context, f feed) (got bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	silence := time.AfterFunc(maxSilence, cancel)
	defer silence.Stop()
	s, err := q.subs.StreamingPull(ctx)
	if err != nil {
		q.pulse.note("StreamingPull", err)
		return false, err
	}
	err = s.Send(&pb.StreamingPullRequest{
		Subscription: f.subscription, StreamAckDeadlineSeconds: newsDeadline, ClientId: q.id,
		MaxOutstandingMessages: maxUnacked, MaxOutstandingBytes: maxUnackedBytes,
	})
	if err != nil {
		return false, err
	}
	for {
		res, err := s.Recv()
		q.pulse.note("StreamingPull", err)
		if err != nil {
			return got, err
		}
		silence.Stop() // handling takes as long as it takes
		req := &pb.StreamingPullRequest{}
		for _, m := range res.GetReceivedMessages() {
			if ctx.Err() != nil {
				return got, ctx.Err()
			}
			got = true
			if f.handle(ctx, m.GetMessage()) {
				req.AckIds = append(req.AckIds, m.GetAckId())
			} else {
				req.ModifyDeadlineAckIds = append(req.ModifyDeadlineAckIds, m.GetAckId())
				req.ModifyDeadlineSeconds = append(req.ModifyDeadlineSeconds, 0)
			}
		}
		if len(req.AckIds)+len(req.ModifyDeadlineAckIds) > 0 {
			if err := s.Send(req); err != nil {
				return got, err
			}
		}
		silence.Reset(maxSilence)
	}
}
