// Package pubsubtest is a fake Cloud Pub/Sub for tests: Google's own pstest, with
// what that leaves out and package pubsub relies on. Its Pull waits until there
// is a message, as the service's does (that of pstest looks twice, half a
// second apart); its StreamingPull sends several messages at a time and no more
// than the client allows. And it can fail: calls can be refused, lose their
// answers or be delayed, streams can be cut. It is no emulator: messages are in
// memory, and nothing checks rights or quotas.
//
// The tests of package pubsub use it in their own process, by New. Where several
// processes are to meet at one, a test's TestMain begins with
//
//	if pubsubtest.RunAsProcess() {
//		return
//	}
//
// and the test calls Start, which starts the test's own program once more and
// returns the address to be set as PUBSUB_EMULATOR_HOST for all of them. Such a
// server outlives any kill of those who call it, ends with the test, and fails by
// chance where its flags say so: Start(t, "--seed=7", "--drop_acks=0.01",
// "--duplicate=0.01", "--burst_every=10s", "--burst=1s"). The command fakepubsub
// is the same for trials by hand.
package pubsubtest

import (
	"context"
	"fmt"
	"maps"
	"net"
	"path"
	"sync"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"cloud.google.com/go/pubsub/v2/pstest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Server is a fake Pub/Sub. It is safe for concurrent use.
type Server struct {
	// Addr is the host:port to be set as PUBSUB_EMULATOR_HOST.
	Addr string

	fake  *pstest.Server
	srv   *grpc.Server
	ended chan struct{}

	// mu guards what follows.
	mu    sync.Mutex
	fault func(method string, req any) Fault
	cut   chan struct{} // closed to end all streams
	wake  chan struct{} // closed when there may be messages for those who wait
	calls map[string]int
}

// A Fault is what happens to a call. The zero Fault is none.
type Fault struct {
	// Before refuses the call with this error.
	Before error
	// After makes the call and then answers with this error.
	After error
	// Delay passes before the call is made.
	Delay time.Duration
	// Twice makes the call twice, and answers with the second answer.
	Twice bool
	// Drop answers an acknowledgement that is not made; those of streams too.
	Drop bool
	// Duplicate lets what a pull brings go to somebody else at once as well.
	Duplicate bool
}

// Lost is the error of an answer that did not arrive.
func Lost() error { return status.Error(codes.Unavailable, "the connection was lost") }

// New starts a server on an address such as "localhost:0". The caller closes it.
func New(addr string) (*Server, error) {
	var config net.ListenConfig
	lis, err := config.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("fake Pub/Sub: %w", err)
	}
	s := &Server{
		Addr: lis.Addr().String(), fake: pstest.NewServer(), ended: make(chan struct{}),
		cut: make(chan struct{}), wake: make(chan struct{}), calls: make(map[string]int),
	}
	s.srv = grpc.NewServer(grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(11<<20), grpc.MaxSendMsgSize(64<<20))
	svc := &service{GServer: &s.fake.GServer, s: s}
	pb.RegisterPublisherServer(s.srv, svc)
	pb.RegisterSubscriberServer(s.srv, svc)
	go func() {
		defer close(s.ended)
		s.srv.Serve(lis) //nolint:errcheck // ends with Close
	}()
	return s, nil
}

// Close ends all calls and frees the server.
func (s *Server) Close() error {
	s.srv.Stop()
	<-s.ended
	err := s.fake.Close()
	s.fake.Wait()
	return err
}

// SetFault has f decide what happens to each call from now on; nil: nothing.
func (s *Server) SetFault(f func(method string, req any) Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// CutStreams ends all streams, which clients then open anew.
func (s *Server) CutStreams() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.cut)
	s.cut = make(chan struct{})
}

// Calls counts the calls so far by their methods. A stream counts once, and in
// "StreamingPull.send" and "StreamingPull.receive" for its messages either way.
func (s *Server) Calls() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.calls)
}

func (s *Server) count(method string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls[method]++
}

func (s *Server) faultOf(method string, req any) Fault {
	s.mu.Lock()
	f := s.fault
	s.mu.Unlock()
	if f == nil {
		return Fault{}
	}
	return f(method, req)
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, call grpc.UnaryHandler) (any, error) {
	method := path.Base(info.FullMethod)
	s.count(method)
	f := s.faultOf(method, req)
	if f.Delay > 0 && !sleep(ctx, f.Delay) {
		return nil, ctx.Err()
	}
	if f.Before != nil {
		return nil, f.Before
	}
	if m, ok := req.(proto.Message); ok && f.Twice {
		if _, err := call(ctx, proto.Clone(m)); err != nil { // a copy, because the fake keeps what it is given
			return nil, err
		}
	}
	if f.Drop {
		return &emptypb.Empty{}, nil
	}
	res, err := call(ctx, req)
	if res, ok := res.(*pb.PullResponse); ok && f.Duplicate {
		s.duplicate(ctx, req, res)
	}
	if f.After != nil {
		return nil, f.After
	}
	return res, err
}

// duplicate makes the messages of a pull available again.
func (s *Server) duplicate(ctx context.Context, req any, res *pb.PullResponse) {
	pull, ok := req.(*pb.PullRequest)
	if !ok {
		return
	}
	for _, m := range res.GetReceivedMessages() {
		s.fake.GServer.ModifyAckDeadline(ctx, &pb.ModifyAckDeadlineRequest{Subscription: pull.GetSubscription(), AckIds: []string{m.GetAckId()}}) //nolint:errcheck // it is there
	}
	s.wakeAll()
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, call grpc.StreamHandler) error {
	method := path.Base(info.FullMethod)
	s.count(method)
	if f := s.faultOf(method, nil); f.Before != nil {
		return f.Before
	}
	return call(srv, ss)
}

// lookEvery is how often who waits looks for messages whose deadlines have
// passed. Of others they are told.
const lookEvery = 20 * time.Millisecond

// awake is closed when there may be messages.
func (s *Server) awake() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wake
}

// wakeAll has all who wait look for messages.
func (s *Server) wakeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.wake)
	s.wake = make(chan struct{})
}

// service is the fake, with its own ways to pull.
type service struct {
	*pstest.GServer
	s *Server
}

// Pull implements pb.SubscriberServer.
func (v *service) Pull(ctx context.Context, req *pb.PullRequest) (*pb.PullResponse, error) {
	end := time.Now().Add(30 * time.Second)
	for {
		awake := v.s.awake()
		res, err := v.pull(ctx, req.GetSubscription(), req.GetMaxMessages())
		if err != nil || len(res.GetReceivedMessages()) > 0 || req.GetReturnImmediately() || time.Now().After(end) { //nolint:staticcheck // deprecated, and in use
			return res, err
		}
		t := time.NewTimer(lookEvery)
		select {
		case <-awake:
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		t.Stop()
	}
}

// Publish implements pb.PublisherServer.
func (v *service) Publish(ctx context.Context, req *pb.PublishRequest) (*pb.PublishResponse, error) {
	res, err := v.GServer.Publish(ctx, req)
	v.s.wakeAll()
	return res, err
}

// ModifyAckDeadline implements pb.SubscriberServer.
func (v *service) ModifyAckDeadline(ctx context.Context, req *pb.ModifyAckDeadlineRequest) (*emptypb.Empty, error) {
	res, err := v.GServer.ModifyAckDeadline(ctx, req)
	if req.GetAckDeadlineSeconds() == 0 {
		v.s.wakeAll()
	}
	return res, err
}

// pull takes what is there.
func (v *service) pull(ctx context.Context, name string, most int32) (*pb.PullResponse, error) {
	return v.GServer.Pull(ctx, &pb.PullRequest{Subscription: name, MaxMessages: most, ReturnImmediately: true}) //nolint:staticcheck // as above
}

// StreamingPull implements pb.SubscriberServer.
func (v *service) StreamingPull(stream pb.Subscriber_StreamingPullServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	v.s.mu.Lock()
	cut := v.s.cut
	v.s.mu.Unlock()
	requests := make(chan *pb.StreamingPullRequest)
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		for {
			req, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case requests <- req:
			case <-ctx.Done():
				return
			}
		}
	}()
	unacked := int64(0)
	for {
		awake := v.s.awake()
		if room := first.GetMaxOutstandingMessages() - unacked; room > 0 || first.GetMaxOutstandingMessages() == 0 {
			if first.GetMaxOutstandingMessages() == 0 {
				room = 100
			}
			res, err := v.pull(ctx, first.GetSubscription(), int32(min(room, 100))) //nolint:gosec // small
			if err != nil {
				return err
			}
			if n := len(res.GetReceivedMessages()); n > 0 {
				unacked += int64(n)
				v.s.count("StreamingPull.send")
				if err := stream.Send(&pb.StreamingPullResponse{ReceivedMessages: res.GetReceivedMessages()}); err != nil {
					return err
				}
			}
		}
		t := time.NewTimer(lookEvery)
		select {
		case <-awake:
		case <-t.C:
		case req := <-requests:
			v.s.count("StreamingPull.receive")
			v.answered(ctx, first.GetSubscription(), req)
			unacked -= int64(len(req.GetAckIds()) + len(req.GetModifyDeadlineAckIds()))
		case <-cut:
			return status.Error(codes.Unavailable, "the stream was cut")
		case err := <-ended:
			return err
		}
		t.Stop()
	}
}

// answered passes on what a client says of messages.
func (v *service) answered(ctx context.Context, name string, req *pb.StreamingPullRequest) {
	if len(req.GetAckIds()) > 0 && !v.s.faultOf("Acknowledge", nil).Drop {
		v.Acknowledge(ctx, &pb.AcknowledgeRequest{Subscription: name, AckIds: req.GetAckIds()}) //nolint:errcheck // as the service: there is no answer
	}
	for i, id := range req.GetModifyDeadlineAckIds() {
		v.ModifyAckDeadline(ctx, &pb.ModifyAckDeadlineRequest{ //nolint:errcheck // as above
			Subscription: name, AckIds: []string{id}, AckDeadlineSeconds: req.GetModifyDeadlineSeconds()[i],
		})
	}
}

// sleep waits, and returns false if ctx ends before.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
