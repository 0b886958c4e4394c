package pubsubtest

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Lacks is what a server leaves out, as some emulators do.
type Lacks struct {
	// Filters: each subscription has all messages of its topic, and does not
	// say what filter it was given.
	Filters bool
	// DeadLetters: deliveries are not counted, and go on for ever.
	DeadLetters bool
	// Updates: subscriptions can't be changed.
	Updates bool
}

// A broker has the topics, the subscriptions and their messages. Nothing in it
// waits or takes longer the more there is of it.
type broker struct {
	mu     sync.Mutex
	closed bool
	lacks  Lacks
	topics map[string]*topic
	subs   map[string]*subscription
	lastID int64
}

type topic struct {
	proto *pb.Topic
	subs  []*subscription
}

type subscription struct {
	proto    *pb.Subscription
	filter   map[string]string
	ready    []*message          // to be delivered, the first is next
	out      map[string]*message // being delivered, by id
	waiting  []chan struct{}     // of capacity 1: who is told of the next that is ready
	promised int                 // how many were told and have not come yet: nobody overtakes them
	deleted  bool
}

// A message is one as a subscription has it.
type message struct {
	msg        *pb.PubsubMessage // not changed any more
	deliveries int
	until      *time.Timer // ends the delivery
}

func (m *message) ackID() string { return fmt.Sprintf("%s:%d", m.msg.GetMessageId(), m.deliveries) }

func (b *broker) publish(name string, msgs []*pb.PubsubMessage) ([]string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	t := b.topics[name]
	if t == nil {
		return nil, status.Errorf(codes.NotFound, "topic %s", name)
	}
	ids := make([]string, len(msgs))
	for i, m := range msgs {
		b.lastID++
		m.MessageId, m.PublishTime = fmt.Sprint(b.lastID), timestamppb.Now()
		ids[i] = m.GetMessageId()
		t.publish(m)
	}
	return ids, nil
}

// publish has the subscriptions deliver m. The mutex is held.
func (t *topic) publish(m *pb.PubsubMessage) {
	for _, s := range t.subs {
		if s.wants(m) {
			s.add(&message{msg: m})
		}
	}
}

func (s *subscription) wants(m *pb.PubsubMessage) bool {
	for key, value := range s.filter {
		if m.GetAttributes()[key] != value {
			return false
		}
	}
	return true
}

// add makes m ready. The mutex is held.
func (s *subscription) add(m *message) {
	s.ready = append(s.ready, m)
	s.wake()
}

// wake tells the next who waits. The mutex is held.
func (s *subscription) wake() {
	for len(s.waiting) > 0 && (len(s.ready) > s.promised || s.deleted) {
		s.waiting[0] <- struct{}{} // never blocks: it was not told yet
		s.waiting = s.waiting[1:]
		s.promised++
	}
}

// wait returns a channel that gets a token when a message may be ready.
func (b *broker) wait(s *subscription) chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	ch := make(chan struct{}, 1)
	s.waiting = append(s.waiting, ch)
	s.wake()
	return ch
}

// leave waits no more, and passes the token on, if it came.
func (b *broker) leave(s *subscription, ch chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if i := slices.Index(s.waiting, ch); i >= 0 {
		s.waiting = slices.Delete(s.waiting, i, i+1)
		return
	}
	s.promised--
	s.wake()
}

func (b *broker) find(name string) (*subscription, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sub(name)
}

// sub is find where the mutex is held.
func (b *broker) sub(name string) (*subscription, error) {
	if s := b.subs[name]; s != nil {
		return s, nil
	}
	return nil, status.Errorf(codes.NotFound, "subscription %s", name)
}

// take delivers up to most messages that are ready, for the given time, or that
// of the subscription where it is 0. Told is set by one who has waited.
func (b *broker) take(s *subscription, most int, deadline time.Duration, told bool) ([]*pb.ReceivedMessage, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if told {
		s.promised--
	}
	if s.deleted {
		return nil, status.Errorf(codes.NotFound, "subscription %s", s.proto.GetName())
	}
	if deadline == 0 {
		deadline = time.Duration(s.proto.GetAckDeadlineSeconds()) * time.Second
	}
	var got []*pb.ReceivedMessage
	for len(got) < most && len(s.ready) > s.promised {
		m := s.ready[0]
		s.ready = s.ready[1:]
		if b.bury(s, m) {
			continue
		}
		m.deliveries++
		s.out[m.msg.GetMessageId()] = m
		b.expire(s, m, deadline)
		r := &pb.ReceivedMessage{AckId: m.ackID(), Message: m.msg}
		if s.proto.GetDeadLetterPolicy() != nil && !b.lacks.DeadLetters {
			r.DeliveryAttempt = int32(m.deliveries) //nolint:gosec // few
		}
		got = append(got, r)
	}
	s.wake() // if there are more
	return got, nil
}

// bury moves m to the dead-letter topic, if it was delivered often enough. The
// mutex is held.
func (b *broker) bury(s *subscription, m *message) bool {
	policy := s.proto.GetDeadLetterPolicy()
	if policy == nil || b.lacks.DeadLetters || m.deliveries < int(policy.GetMaxDeliveryAttempts()) {
		return false
	}
	if t := b.topics[policy.GetDeadLetterTopic()]; t != nil {
		t.publish(m.msg)
	}
	return true
}

// expire has m delivered again after d, unless that is changed. The mutex is held.
func (b *broker) expire(s *subscription, m *message, d time.Duration) {
	if m.until != nil {
		m.until.Stop()
	}
	n := m.deliveries
	m.until = time.AfterFunc(d, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if !b.closed && m.deliveries == n && s.out[m.msg.GetMessageId()] == m {
			b.again(s, m)
		}
	})
}

// again makes ready what is being delivered. The mutex is held.
func (b *broker) again(s *subscription, m *message) {
	m.until.Stop()
	delete(s.out, m.msg.GetMessageId())
	s.add(m)
}

// acknowledge ends messages, whichever of their deliveries the ids are of.
func (b *broker) acknowledge(name string, ids []string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	s, err := b.sub(name)
	if err != nil {
		return err
	}
	for _, id := range ids {
		id, _, _ := strings.Cut(id, ":")
		if m := s.out[id]; m != nil {
			m.until.Stop()
			delete(s.out, id)
			continue
		}
		s.ready = slices.DeleteFunc(s.ready, func(m *message) bool { return m.msg.GetMessageId() == id })
	}
	return nil
}

// modify gives deliveries d from now. Of one that is over it changes nothing.
func (b *broker) modify(name string, ids []string, d time.Duration) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	s, err := b.sub(name)
	if err != nil {
		return err
	}
	for _, ackID := range ids {
		id, _, _ := strings.Cut(ackID, ":")
		m := s.out[id]
		switch {
		case m == nil || m.ackID() != ackID:
		case d == 0:
			b.again(s, m)
		default:
			b.expire(s, m, d)
		}
	}
	return nil
}

func (b *broker) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for _, s := range b.subs {
		for _, m := range s.out {
			m.until.Stop()
		}
	}
}

// parseFilter reads what package pubsub writes: equalities of attributes, all of
// which must hold.
func parseFilter(filter string) (map[string]string, error) {
	parsed := make(map[string]string)
	if filter == "" {
		return parsed, nil
	}
	for part := range strings.SplitSeq(filter, " AND ") {
		key, value, ok := strings.Cut(part, " = ")
		key, ok2 := strings.CutPrefix(key, "attributes.")
		if !ok || !ok2 || len(value) < 2 || value[0] != '"' || value[len(value)-1] != '"' {
			return nil, status.Errorf(codes.InvalidArgument, "the filter %q is more than this fake can read", filter)
		}
		parsed[key] = value[1 : len(value)-1]
	}
	return parsed, nil
}
