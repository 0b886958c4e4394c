package pubsub

import (
	"context"
	"fmt"
	"path"
	"sync/atomic"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/mettle/queue"
)

// A pulse is when the broker was last heard and last not heard.
type pulse struct {
	began     time.Time
	good, bad atomic.Int64 // since began, in nanoseconds; 0: never
}

// pulseTime is how long an answer stands for the next ones.
const pulseTime = 45 * time.Second

// heard notes that the broker has answered.
func (p *pulse) heard() { p.good.Store(int64(time.Since(p.began))) }

// missed notes that it has not.
func (p *pulse) missed() { p.bad.Store(int64(time.Since(p.began))) }

// beats reports whether the broker has answered not long ago, and since then
// there was no reason to doubt it.
func (p *pulse) beats() bool {
	good := p.good.Load()
	return good > p.bad.Load() && time.Since(p.began)-time.Duration(good) < pulseTime
}

// note takes in how a call has ended. A pull that waits has not failed when its
// time is over, and a caller who gives up says nothing of the broker.
func (p *pulse) note(method string, err error) {
	switch status.Code(err) {
	case codes.Canceled:
	case codes.DeadlineExceeded:
		if method != "Pull" {
			p.missed()
		}
	case codes.Unavailable, codes.Unauthenticated:
		p.missed()
	default:
		p.heard()
	}
}

func (p *pulse) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error { //nolint:revive // gRPC's signature
	err := call(ctx, method, req, reply, cc, opts...)
	p.note(path.Base(method), err)
	return err
}

// Ready implements queue.Broker. Where the broker has answered something within
// the last 45 s, and nothing has failed since, that is the sign of life: the
// thousands of processes of a fleet that are asked every few seconds must not use
// up the project's quota of administrative calls. Otherwise the topic of jobs
// is looked at; that somebody may not look at it is an answer as well.
func (q *Queue) Ready(ctx context.Context) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case q.isClosed():
		return fmt.Errorf("ready: %w", queue.ErrClosed)
	case q.pulse.beats():
		return nil
	}
	name := q.topic("jobs")
	err := q.call(ctx, target{"look at the topic", name, "pubsub.topics.get"}, func(ctx context.Context) error {
		_, err := q.topics.GetTopic(ctx, &pb.GetTopicRequest{Topic: name})
		return ifNot(codes.PermissionDenied, err)
	})
	if err != nil {
		return fmt.Errorf("ready: %w", err)
	}
	return nil
}
