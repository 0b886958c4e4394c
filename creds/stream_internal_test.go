package creds

import (
	"context"
	"testing"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// late is a stream of which a message comes when the handler has ended already.
type late struct {
	grpc.ServerStream
	ctx   context.Context //nolint:containedctx // that of the stream, as gRPC has it
	ended chan struct{}
}

func (s *late) Context() context.Context { return s.ctx }

func (s *late) RecvMsg(m any) error {
	<-s.ended
	m.(*bytestream.WriteRequest).ResourceName = "uploads/x/blobs/y/1"
	return nil
}

// TestGuard_lateMessage: a handler may end while a goroutine of its own waits for a
// message, as that of an upload that is passed on does where the storage has refused it.
// It takes -race to fail.
func TestGuard_lateMessage(t *testing.T) {
	g := &Guard{audits: newAudits()}
	var err error
	if g.metrics, err = newMetrics(nil); err != nil {
		t.Fatal(err)
	}
	g.policy.Store(&policy{anonymous: &Identity{Name: anonymousName, Kind: anonymousName, grants: []grant{{[]Right{CASWrite}, []string{"other"}}}}})
	ss := &late{ctx: t.Context(), ended: make(chan struct{})}
	received := make(chan error, 1)
	err = g.stream(nil, ss, &grpc.StreamServerInfo{FullMethod: "/google.bytestream.ByteStream/Write"}, func(_ any, stream grpc.ServerStream) error {
		go func() { received <- stream.RecvMsg(&bytestream.WriteRequest{}) }()
		close(ss.ended)
		return status.Error(codes.NotFound, "the handler's")
	})
	if code := status.Code(err); code != codes.NotFound && code != codes.InvalidArgument && code != codes.PermissionDenied {
		t.Errorf("the call ends with %v", err)
	}
	if err := <-received; err == nil {
		t.Error("a message without the right is let pass")
	}
}
