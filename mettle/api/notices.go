package api

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// listen hears the notices of workers and of other servers.
func (s *Server) listen(ctx context.Context) error {
	return s.again(ctx, "notices not heard, trying again", func() error {
		return s.opts.Notices.ListenNotices(ctx, s.opts.ID, s.notice)
	})
}

// notice takes in one notice. It does not block.
func (s *Server) notice(n *queuepb.Notice) {
	s.opts.Platforms.Heard()
	switch about := n.GetAbout().(type) {
	case *queuepb.Notice_Worker:
		s.opts.Platforms.Observe(about.Worker)
	case *queuepb.Notice_Cancellation:
		s.hearCancellation(about.Cancellation)
	case *queuepb.Notice_Takeover:
		if about.Takeover.GetServer() != s.opts.ID {
			s.ops.TakenOver(about.Takeover.GetOperation())
		}
	case *queuepb.Notice_Withdrawal:
		if about.Withdrawal.GetServer() != s.opts.ID {
			s.ops.Withdrawn(&queuepb.Update{Operation: about.Withdrawal.GetOperation()})
		}
	default: // of this server's own, or of a version to come
	}
}

// The server tells itself something every echoEvery, well below the time after
// which package platform takes it for deaf.
const (
	echoEvery   = 5 * time.Second
	echoTimeout = 5 * time.Second
)

// echo tells all servers a notice about nothing every so often. One that hears
// it knows that it would hear of workers too, if there were any.
func (s *Server) echo(ctx context.Context) error {
	t := time.NewTicker(echoEvery)
	defer t.Stop()
	for {
		callCtx, cancel := context.WithTimeout(ctx, echoTimeout)
		err := s.opts.Notices.Notify(callCtx, &queuepb.Notice{Sent: timestamppb.Now()})
		cancel()
		if err != nil {
			s.log.DebugContext(ctx, "notice not sent", "error", err) // listen tells of a broker that is away
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
	}
}
