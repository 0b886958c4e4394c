package api

import (
	"context"
	"fmt"
	"sync"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/mettle/operation"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// answerTimeout is how long the other API servers have to say that they hold an
// operation, and the ActionCache that it has a result. A server that is late has
// its job withdrawn, and publishes it again if another client waits for it there.
const answerTimeout = time.Second

// CancelOperation implements google.longrunning.Operations. It ends the wait of
// the clients that wait by that name, on all API servers: their operation is done
// then, with the status CANCELLED in its response, and so it is for those who
// ask for it by that name in the next minutes. Where nobody waits for the same
// execution by another name, its job is withdrawn and its worker kills it. An
// operation that has ended stays as it is, which is no error.
func (s *Server) CancelOperation(ctx context.Context, req *longrunningpb.CancelOperationRequest) (*emptypb.Empty, error) {
	n, err := operationName(req.GetName())
	if err == nil {
		err = s.cancel(ctx, n)
	}
	if err != nil {
		return nil, toStatus(err)
	}
	return &emptypb.Empty{}, nil
}

// operationName is the name in a request of the Operations service.
func operationName(name string) (operation.Name, error) {
	if name == "" {
		return operation.Name{}, fmt.Errorf("%w: the name is absent", errInvalid)
	}
	return parseName(name)
}

func (s *Server) cancel(ctx context.Context, n operation.Name) error {
	name := n.String()
	if !s.ops.Holds(n) {
		c := &call{s: s, resumed: true}
		c.setName(n)
		askCtx, stop := context.WithTimeout(ctx, answerTimeout)
		res, err := s.cached(askCtx, c)
		stop()
		if err == nil && res != nil {
			return nil // it has ended
		}
	}
	answer, forget := s.answers.expect(name)
	defer forget()
	held := s.ops.Cancel(n)
	if held == operation.HasEnded {
		return nil
	}
	told := s.say(&queuepb.Notice{About: &queuepb.Notice_Cancellation{
		Cancellation: &queuepb.Cancellation{Operation: name, Server: s.opts.ID},
	}})
	if held == operation.Held {
		return nil
	}
	if told {
		timer := time.NewTimer(answerTimeout)
		defer timer.Stop()
		select {
		case <-answer:
			return nil
		case <-timer.C:
		}
	}
	// Nobody has it: its servers have restarted, and its client has not come back.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), publishTimeout)
	defer cancel()
	if err := (withdrawer{s}).Cancel(ctx, name); err != nil {
		return fmt.Errorf("%w: %w", errWithdraw, err)
	}
	return nil
}

// hearCancellation takes in a Cancellation, and answers one of another server.
func (s *Server) hearCancellation(c *queuepb.Cancellation) {
	if c.GetServer() == s.opts.ID {
		return
	}
	n, err := parseName(c.GetOperation())
	if err != nil {
		return
	}
	if c.GetHeld() {
		if c.GetEnded() {
			s.ops.Uncancel(n)
		}
		s.answers.tell(c.GetOperation())
		return
	}
	held := s.ops.Cancel(n)
	if held == operation.NotHeld {
		return
	}
	s.say(&queuepb.Notice{About: &queuepb.Notice_Cancellation{Cancellation: &queuepb.Cancellation{
		Operation: c.GetOperation(), Server: s.opts.ID, Held: true, Ended: held == operation.HasEnded,
	}}})
}

// takeOver tells the others that clients of the operation wait here from now on.
func (s *Server) takeOver(job string) {
	s.ops.TookOver(job)
	s.say(&queuepb.Notice{About: &queuepb.Notice_Takeover{
		Takeover: &queuepb.Takeover{Operation: job, Server: s.opts.ID},
	}})
}

// takeoverEvery is how often a takeover is said again, since notices may be
// lost, and the server that was left withdraws the job some minutes later.
const takeoverEvery = time.Minute

// insist is takeOver from time to time, by a client that came back and waits, or
// that has been here all the time while another one of the operation turned up
// elsewhere: that server withdraws the job when its client has gone.
func (c *call) insist(w *operation.Wait) {
	if time.Since(c.tookOver) < takeoverEvery {
		return
	}
	if c.resumed && w.Job() == c.text || c.s.ops.Elsewhere(w) {
		c.tookOver = time.Now()
		c.s.takeOver(w.Job())
	}
}

// A withdrawer withdraws jobs and tells the other API servers, whose clients may
// wait for them.
type withdrawer struct{ s *Server }

// Cancel implements operation.Withdrawer.
func (w withdrawer) Cancel(ctx context.Context, name string) error {
	if err := w.s.opts.Jobs.Cancel(ctx, name); err != nil {
		return err
	}
	w.s.say(&queuepb.Notice{About: &queuepb.Notice_Withdrawal{
		Withdrawal: &queuepb.Withdrawal{Operation: name, Server: w.s.opts.ID},
	}})
	return nil
}

// update takes in an update of a worker or the broker. A worker that was told of
// a withdrawal reports CANCELLED. It was not by this server, which has no such
// operation any more then.
func (s *Server) update(u *queuepb.Update) {
	if u.GetStage() == queuepb.Update_COMPLETED && codeOf(u.GetExecuteResponse()) == uint64(codes.Canceled) {
		s.ops.Withdrawn(u)
		return
	}
	s.ops.Update(u)
}

// maxUnsaid is how many notices may wait for the broker: those of a large build
// that all its servers' clients resume at once.
const maxUnsaid = 1 << 14

// say has a notice told to the other API servers, soon. It reports whether it
// will be: not where there are none, or the broker is far behind. Nothing is lost
// by that but work.
func (s *Server) say(n *queuepb.Notice) bool {
	if s.opts.Notices == nil {
		return false
	}
	n.Sent = timestamppb.Now()
	select {
	case s.unsaid <- n:
		return true
	default:
		return false
	}
}

const (
	// notifyTimeout bounds one Notify.
	notifyTimeout = 10 * time.Second
	// speakers is how many there are at once: a build that is cancelled has
	// thousands to be told, and a broker takes some milliseconds for each.
	speakers = 8
)

// speak gives the broker what is to be said.
func (s *Server) speak(ctx context.Context) error {
	for {
		select {
		case n := <-s.unsaid:
			callCtx, cancel := context.WithTimeout(ctx, notifyTimeout)
			err := s.opts.Notices.Notify(callCtx, n)
			cancel()
			if err != nil && ctx.Err() == nil {
				s.log.WarnContext(ctx, "the other API servers were not told", "error", err)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// answers are the calls that wait for another API server to say that it holds an
// operation.
type answers struct {
	mu      sync.Mutex // guards waiting
	waiting map[string]map[chan struct{}]struct{}
}

func newAnswers() *answers {
	return &answers{waiting: make(map[string]map[chan struct{}]struct{})}
}

// expect returns a channel on which the answer for name comes. The caller
// forgets it.
func (a *answers) expect(name string) (answer <-chan struct{}, forget func()) {
	ch := make(chan struct{}, 1) // one answer is enough
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting[name] == nil {
		a.waiting[name] = make(map[chan struct{}]struct{})
	}
	a.waiting[name][ch] = struct{}{}
	return ch, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.waiting[name], ch)
		if len(a.waiting[name]) == 0 {
			delete(a.waiting, name)
		}
	}
}

func (a *answers) tell(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for ch := range a.waiting[name] {
		select {
		case ch <- struct{}{}: // never blocks: see expect
		default:
		}
	}
}
