// Package pubsubtest is a fake Cloud Pub/Sub for tests: as much of the service as
// package pubsub relies on, with its habits. A pull waits until there is a
// message, a stream sends no more than the client allows, deliveries are counted
// where there is a dead-letter policy, and a message whose deadline has passed
// goes to somebody else. And it can fail: calls can be refused, lose their answers
// or be delayed, streams can be cut, what an emulator lacks can be lacking. Messages
// are in memory, and nothing checks rights or quotas.
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

	b     *broker
	srv   *grpc.Server
	ended chan struct{}

	// mu guards what follows.
	mu    sync.Mutex
	fault func(method string, req any) Fault
	cut   chan struct{} // closed to end all streams
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
		Addr: lis.Addr().String(), ended: make(chan struct{}), cut: make(chan struct{}), calls: make(map[string]int),
		b: &broker{topics: make(map[string]*topic), subs: make(map[string]*subscription)},
	}
	s.srv = grpc.NewServer(grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(11<<20), grpc.MaxSendMsgSize(64<<20))
	pb.RegisterPublisherServer(s.srv, &publisher{b: s.b})
	pb.RegisterSubscriberServer(s.srv, &subscriber{b: s.b, s: s})
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
	s.b.close()
	return nil
}

// Lack leaves things out from now on.
func (s *Server) Lack(l Lacks) {
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	s.b.lacks = l
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

func (s *Server) cutting() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cut
}

// Calls counts the calls so far by their methods. A stream counts once, and in
// "StreamingPull.send" and "StreamingPull.receive" for its messages either way.
func (s *Server) Calls() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.calls)
}

// Waiting counts the pulls and streams that wait for a message of a subscription.
func (s *Server) Waiting(subscription string) int {
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	if sub := s.b.subs[subscription]; sub != nil {
		return len(sub.waiting)
	}
	return 0
}

// Unacked counts the messages of a subscription that are not acknowledged.
func (s *Server) Unacked(subscription string) int {
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	if sub := s.b.subs[subscription]; sub != nil {
		return len(sub.ready) + len(sub.out)
	}
	return 0
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
		s.duplicate(req, res)
	}
	if f.After != nil {
		return nil, f.After
	}
	return res, err
}

// duplicate makes the messages of a pull available again.
func (s *Server) duplicate(req any, res *pb.PullResponse) {
	pull, ok := req.(*pb.PullRequest)
	if !ok {
		return
	}
	for _, m := range res.GetReceivedMessages() {
		s.b.modify(pull.GetSubscription(), []string{m.GetAckId()}, 0) //nolint:errcheck // it is there
	}
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, call grpc.StreamHandler) error {
	method := path.Base(info.FullMethod)
	s.count(method)
	if f := s.faultOf(method, nil); f.Before != nil {
		return f.Before
	}
	return call(srv, ss)
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
