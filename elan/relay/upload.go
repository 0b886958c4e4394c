package relay

import (
	"context"
	"errors"
	"io"
	"sync"

	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/wire"
)

// upload passes on a call of many messages.
func (r *Relay) upload(ss grpc.ServerStream, m *method) error {
	ctx, cancel := context.WithCancelCause(ss.Context())
	defer cancel(nil)
	out := outgoing(ctx)
	s := &sender{ss: ss, fail: cancel, keeps: true}
	defer s.forget()
	a := attempts{r: r, m: m}
	for {
		conn, err := a.conn(ctx)
		if err != nil {
			return err
		}
		p := passage{ss: ss}
		p.err = r.uploadOnce(out, conn, s, &p, m)
		if clientErr := context.Cause(ctx); clientErr != nil && ss.Context().Err() == nil {
			return clientErr //nolint:wrapcheck // a status, of what the client sent
		}
		if p.err == nil || p.begun || !s.whole() || !a.again(ctx, p.err, p.answered()) {
			return p.finish()
		}
	}
}

// uploadOnce makes one attempt.
func (r *Relay) uploadOnce(ctx context.Context, conn *grpc.ClientConn, s *sender, p *passage, m *method) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cs, err := conn.NewStream(ctx, m.desc, m.full, r.codec)
	if err != nil {
		return err //nolint:wrapcheck // a status
	}
	s.sendTo(cs)
	return p.run(cs)
}

// sender takes the client's messages to the storage, in a goroutine that begins
// with the first attempt and ends when the client has sent all, or when the call
// ends: only the end of the call's handler ends the wait for the client's next
// message, so that the handler can't wait for the goroutine, which touches
// nothing then but what is here.
type sender struct {
	ss   grpc.ServerStream
	fail context.CancelCauseFunc // ends the call where what the client sent is no message

	// mu is held while a message is sent, so that messages stay in order. Ending
	// the attempt ends that.
	mu        sync.Mutex
	cs        grpc.ClientStream // of the last attempt
	kept      []*wire.Raw       // all that the client has sent, as long as keeps
	keptBytes int
	keeps     bool
	ended     bool // the client has sent all
}

// sendTo begins an attempt: what was sent before is sent again.
func (s *sender) sendTo(cs grpc.ClientStream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := s.cs == nil
	s.cs = cs
	for _, msg := range s.kept {
		once := msg.Clone()
		err := cs.SendMsg(once)
		once.Free()
		if err != nil {
			return // the answer explains
		}
	}
	if s.ended {
		_ = cs.CloseSend() // it never fails
	}
	if first {
		go s.run()
	}
}

// run receives until the client has sent all, the call ends, or nobody is left to
// send to.
func (s *sender) run() {
	msg := &wire.Raw{}
	defer msg.Free()
	for {
		err := s.ss.RecvMsg(msg)
		switch {
		case errors.Is(err, io.EOF):
			s.mu.Lock()
			s.ended = true
			_ = s.cs.CloseSend() // it never fails
			s.mu.Unlock()
			return
		case err != nil:
			s.fail(err)
			return
		}
		if !s.send(msg) {
			return
		}
	}
}

// send sends a message, and reports whether there is a use for the next.
func (s *sender) send(msg *wire.Raw) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keeps && s.keptBytes+msg.Len() > maxKept {
		s.drop()
	}
	if s.keeps {
		s.keptBytes += msg.Len()
		s.kept = append(s.kept, msg.Clone())
	}
	// An error means that the attempt has ended. Another is made only with all that
	// was kept.
	return s.cs.SendMsg(msg) == nil || s.keeps
}

// whole reports whether everything that the client sent can be sent again.
func (s *sender) whole() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keeps
}

// forget frees what is kept.
func (s *sender) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop()
}

// drop is forget for one who has mu.
func (s *sender) drop() {
	for _, msg := range s.kept {
		msg.Free()
	}
	s.kept, s.keeps = nil, false
}
