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
	out := r.outgoing(ctx)
	s := newSender(ss, cancel)
	s.first = func(msg *wire.Raw) {
		if isLogWrite(m, msg) {
			r.o.Patient(ctx)
		}
	}
	defer s.end()
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
		if !p.begun && a.elsewhere(ctx, p.err, p.trailer) && s.detach() {
			continue
		}
		if p.err == nil || p.begun || !s.detach() || !a.again(ctx, p.err, p.answered()) {
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
	s.attach(cs)
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
	// first is told of the client's first message.
	first func(*wire.Raw)

	// mu is held while a message is sent, so that messages stay in order. The end of
	// the attempt ends that.
	mu        sync.Mutex
	changed   *sync.Cond        // of cs and over
	cs        grpc.ClientStream // of the attempt; nil: there is none now
	kept      []*wire.Raw       // all that the client has sent, as long as keeps
	keptBytes int
	keeps     bool
	begun     bool // the goroutine has
	sentAll   bool // the client has
	over      bool // the call is
}

func newSender(ss grpc.ServerStream, fail context.CancelCauseFunc) *sender {
	s := &sender{ss: ss, fail: fail, keeps: true}
	s.changed = sync.NewCond(&s.mu)
	return s
}

// attach begins an attempt: what was sent before is sent again.
func (s *sender) attach(cs grpc.ClientStream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, msg := range s.kept {
		once := msg.Clone()
		err := cs.SendMsg(once)
		once.Free()
		if err != nil {
			return // the attempt has ended, and its answer explains
		}
	}
	if s.sentAll {
		_ = cs.CloseSend() // it never fails
	}
	s.cs = cs
	s.changed.Signal()
	if !s.begun {
		s.begun = true
		go s.run()
	}
}

// detach ends an attempt, and reports whether there can be another.
func (s *sender) detach() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cs = nil
	return s.keeps
}

// end ends the call.
func (s *sender) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	s.drop()
	s.changed.Signal()
}

// drop frees what is kept. The caller has mu.
func (s *sender) drop() {
	for _, msg := range s.kept {
		msg.Free()
	}
	s.kept, s.keeps = nil, false
}

// run receives until the client has sent all, or the call ends.
func (s *sender) run() {
	msg := &wire.Raw{}
	defer msg.Free()
	for first := true; ; first = false {
		err := s.ss.RecvMsg(msg)
		if errors.Is(err, io.EOF) {
			s.sentLast()
			return
		}
		if err != nil {
			s.fail(err)
			return
		}
		if first {
			s.first(msg)
		}
		if !s.send(msg) {
			return
		}
	}
}

func (s *sender) sentLast() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sentAll = true
	if s.cs != nil {
		_ = s.cs.CloseSend() // it never fails
	}
}

// send sends a message, by the next attempt where there is none now, and reports
// whether it did before the call ended.
func (s *sender) send(msg *wire.Raw) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		for s.cs == nil && !s.over {
			s.changed.Wait()
		}
		if s.over {
			return false
		}
		once := msg.Clone()
		err := s.cs.SendMsg(once)
		once.Free()
		if err == nil {
			s.keep(msg)
			return true
		}
		s.cs = nil // it has ended, which the handler hears too
	}
}

// keep keeps what was sent, if there is room. The caller has mu.
func (s *sender) keep(msg *wire.Raw) {
	if !s.keeps {
		return
	}
	if s.keptBytes += msg.Len(); s.keptBytes > maxKept {
		s.drop()
		return
	}
	s.kept = append(s.kept, msg.Clone())
}
