package pubsubtest

import (
	"context"
	"slices"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

// CreateTopic implements pb.PublisherServer.
func (v *publisher) CreateTopic(_ context.Context, req *pb.Topic) (*pb.Topic, error) {
	v.b.mu.Lock()
	defer v.b.mu.Unlock()
	if v.b.topics[req.GetName()] != nil {
		return nil, status.Errorf(codes.AlreadyExists, "topic %s", req.GetName())
	}
	v.b.topics[req.GetName()] = &topic{proto: proto.CloneOf(req)}
	return req, nil
}

// GetTopic implements pb.PublisherServer.
func (v *publisher) GetTopic(_ context.Context, req *pb.GetTopicRequest) (*pb.Topic, error) {
	v.b.mu.Lock()
	defer v.b.mu.Unlock()
	if t := v.b.topics[req.GetTopic()]; t != nil {
		return proto.CloneOf(t.proto), nil
	}
	return nil, status.Errorf(codes.NotFound, "topic %s", req.GetTopic())
}

// CreateSubscription implements pb.SubscriberServer.
func (v *subscriber) CreateSubscription(_ context.Context, req *pb.Subscription) (*pb.Subscription, error) {
	filter, err := parseFilter(req.GetFilter())
	if err != nil {
		return nil, err
	}
	v.b.mu.Lock()
	defer v.b.mu.Unlock()
	t := v.b.topics[req.GetTopic()]
	switch dead := req.GetDeadLetterPolicy().GetDeadLetterTopic(); {
	case v.b.subs[req.GetName()] != nil:
		return nil, status.Errorf(codes.AlreadyExists, "subscription %s", req.GetName())
	case t == nil:
		return nil, status.Errorf(codes.NotFound, "topic %s", req.GetTopic())
	case dead != "" && v.b.topics[dead] == nil:
		return nil, status.Errorf(codes.NotFound, "dead-letter topic %s", dead)
	}
	s := &subscription{proto: proto.CloneOf(req), filter: filter, out: make(map[string]*message)}
	if s.proto.GetAckDeadlineSeconds() == 0 {
		s.proto.AckDeadlineSeconds = 10
	}
	if v.b.lacks.Filters {
		s.proto.Filter, s.filter = "", nil
	}
	v.b.subs[req.GetName()] = s
	t.subs = append(t.subs, s)
	return proto.CloneOf(s.proto), nil
}

// GetSubscription implements pb.SubscriberServer.
func (v *subscriber) GetSubscription(_ context.Context, req *pb.GetSubscriptionRequest) (*pb.Subscription, error) {
	v.b.mu.Lock()
	defer v.b.mu.Unlock()
	s, err := v.b.sub(req.GetSubscription())
	if err != nil {
		return nil, err
	}
	return proto.CloneOf(s.proto), nil
}

// UpdateSubscription implements pb.SubscriberServer.
func (v *subscriber) UpdateSubscription(_ context.Context, req *pb.UpdateSubscriptionRequest) (*pb.Subscription, error) {
	v.b.mu.Lock()
	defer v.b.mu.Unlock()
	s, err := v.b.sub(req.GetSubscription().GetName())
	if err != nil {
		return nil, err
	}
	if v.b.lacks.Updates {
		return nil, status.Error(codes.Unimplemented, "subscriptions can't be changed")
	}
	old, changed := s.proto.ProtoReflect(), proto.CloneOf(req.GetSubscription()).ProtoReflect()
	for _, path := range req.GetUpdateMask().GetPaths() {
		field := old.Descriptor().Fields().ByTextName(path)
		switch {
		case field == nil || slices.Contains([]string{"name", "topic", "filter"}, path):
			return nil, status.Errorf(codes.InvalidArgument, "%q can't be changed", path)
		case changed.Has(field):
			old.Set(field, changed.Get(field))
		default:
			old.Clear(field)
		}
	}
	return proto.CloneOf(s.proto), nil
}

// DeleteSubscription implements pb.SubscriberServer.
func (v *subscriber) DeleteSubscription(_ context.Context, req *pb.DeleteSubscriptionRequest) (*emptypb.Empty, error) {
	v.b.mu.Lock()
	defer v.b.mu.Unlock()
	s, err := v.b.sub(req.GetSubscription())
	if err != nil {
		return nil, err
	}
	delete(v.b.subs, req.GetSubscription())
	if t := v.b.topics[s.proto.GetTopic()]; t != nil {
		t.subs = slices.DeleteFunc(t.subs, func(other *subscription) bool { return other == s })
	}
	s.deleted = true
	s.wake()
	return &emptypb.Empty{}, nil
}
