package pubsubtest

import (
	"context"
	"errors"
	"io"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// publisher and subscriber serve a broker by gRPC.
type publisher struct {
	pb.UnimplementedPublisherServer
	b *broker
}

type subscriber struct {
	pb.UnimplementedSubscriberServer
	b *broker
	s *Server
}

// Publish implements pb.PublisherServer.
func (v *publisher) Publish(_ context.Context, req *pb.PublishRequest) (*pb.PublishResponse, error) {
	ids, err := v.b.publish(req.GetTopic(), req.GetMessages())
	if err != nil {
		return nil, err
	}
	return &pb.PublishResponse{MessageIds: ids}, nil
}

// pullTime is how long a pull waits for a message.
const pullTime = 30 * time.Second

// Pull implements pb.SubscriberServer.
func (v *subscriber) Pull(ctx context.Context, req *pb.PullRequest) (*pb.PullResponse, error) {
	s, err := v.b.find(req.GetSubscription())
	if err != nil {
		return nil, err
	}
	end := time.NewTimer(pullTime)
	defer end.Stop()
	for told := false; ; told = true {
		got, err := v.b.take(s, int(req.GetMaxMessages()), 0, told)
		if err != nil || len(got) > 0 || req.GetReturnImmediately() { //nolint:staticcheck // deprecated, and in use
			return &pb.PullResponse{ReceivedMessages: got}, err
		}
		ready := v.b.wait(s)
		select {
		case <-ready:
			continue
		case <-end.C:
			v.b.leave(s, ready)
			return &pb.PullResponse{}, nil
		case <-ctx.Done():
			v.b.leave(s, ready)
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
}

func deadline(seconds int32) time.Duration { return time.Duration(seconds) * time.Second }

// Acknowledge implements pb.SubscriberServer.
func (v *subscriber) Acknowledge(_ context.Context, req *pb.AcknowledgeRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, v.b.acknowledge(req.GetSubscription(), req.GetAckIds())
}

// ModifyAckDeadline implements pb.SubscriberServer.
func (v *subscriber) ModifyAckDeadline(_ context.Context, req *pb.ModifyAckDeadlineRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, v.b.modify(req.GetSubscription(), req.GetAckIds(), deadline(req.GetAckDeadlineSeconds()))
}

// batch bounds the messages of one message of a stream.
const batch = 100

// StreamingPull implements pb.SubscriberServer.
func (v *subscriber) StreamingPull(stream pb.Subscriber_StreamingPullServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	s, err := v.b.find(first.GetSubscription())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	answers := make(chan *pb.StreamingPullRequest)
	go listen(stream, answers, cancel, ctx.Done())
	cut := v.s.cutting()
	room := int(first.GetMaxOutstandingMessages())
	if room <= 0 {
		room = 1000
	}
	for told := false; ; {
		var ready chan struct{} // nil while there is no room
		if room > 0 {
			got, err := v.b.take(s, min(room, batch), deadline(first.GetStreamAckDeadlineSeconds()), told)
			told = false
			if err != nil {
				return err
			}
			if len(got) > 0 {
				room -= len(got)
				v.s.count("StreamingPull.send")
				if err := stream.Send(&pb.StreamingPullResponse{ReceivedMessages: got}); err != nil {
					return err
				}
				continue
			}
			ready = v.b.wait(s)
		}
		select {
		case <-ready:
			told = true
			continue
		case req := <-answers:
			v.s.count("StreamingPull.receive")
			room += v.answered(first.GetSubscription(), req)
		case <-cut:
			err = status.Error(codes.Unavailable, "the stream was cut")
		case <-ctx.Done():
			if err = context.Cause(ctx); errors.Is(err, io.EOF) {
				err = nil
			}
		}
		if ready != nil {
			v.b.leave(s, ready)
		}
		if err != nil || ctx.Err() != nil {
			return err
		}
	}
}

// listen passes on what a client says, until it ends.
func listen(stream pb.Subscriber_StreamingPullServer, answers chan<- *pb.StreamingPullRequest, end context.CancelCauseFunc, done <-chan struct{}) {
	for {
		req, err := stream.Recv()
		if err != nil {
			end(err)
			return
		}
		select {
		case answers <- req:
		case <-done:
			return
		}
	}
}

// answered takes in what a client says of messages, and returns of how many. As
// with the service, there is no answer, so there are no errors.
func (v *subscriber) answered(name string, req *pb.StreamingPullRequest) int {
	if len(req.GetAckIds()) > 0 && !v.s.faultOf("Acknowledge", nil).Drop {
		v.b.acknowledge(name, req.GetAckIds()) //nolint:errcheck // as told
	}
	for i, id := range req.GetModifyDeadlineAckIds() {
		v.b.modify(name, []string{id}, deadline(req.GetModifyDeadlineSeconds()[i])) //nolint:errcheck // as told
	}
	return len(req.GetAckIds()) + len(req.GetModifyDeadlineAckIds())
}
