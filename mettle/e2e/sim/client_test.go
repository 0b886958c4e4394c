//go:build linux

package sim_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
)

// A client wants one action executed, and behaves as Bazel does: when its stream
// breaks it waits for the operation again, on whichever server it reaches; when
// that is not known it starts anew, and so it does after errors that may pass.
type client struct {
	w      *world
	number int
	visit  visit
	action *act
	name   string // of the operation that it waits for
	since  time.Duration
	gone   <-chan time.Time // when it leaves

	cancelled atomic.Bool   // somebody has begun to cancel its operation
	ended     chan struct{} // closed when it has its answer
}

// maxTries bounds what a client tries, far above what the faults explain.
const maxTries = 1000

func (c *client) run() {
	w := c.w
	time.Sleep(time.Until(w.start.Add(c.visit.at)))
	c.since, c.ended = w.now(), make(chan struct{})
	defer close(c.ended)
	if c.visit.leaves > 0 {
		c.gone = time.After(c.visit.leaves)
	}
	for try := 0; ; try++ {
		if w.hasGivenUp() || try == maxTries {
			w.violate("client %d has no answer after %d tries", c.number, try)
			return
		}
		a := w.apis[w.dice.among(fmt.Sprint("balancer ", c.number), len(w.apis))]
		res, err := c.attempt(a)
		if errors.Is(err, errLeft) {
			w.trace(c.who(), "leaves")
			w.hasLeft(c)
			return
		}
		if res != nil {
			if c.judge(res) {
				return
			}
			c.name = "" // it executes once more
		} else {
			c.judgeBreak(a, err)
		}
		select {
		case <-time.After(w.dice.between(c.who()+" retries", 100*time.Millisecond, 3*time.Second)):
		case <-c.gone:
			w.hasLeft(c)
			return
		}
	}
}

// cancelLater has the operation cancelled by whichever server is there, as often
// as it takes to be told that it is, unless it ends before.
func (c *client) cancelLater(name string) {
	w, key := c.w, c.who()+" cancels"
	wait := time.After(max(c.visit.cancels-(w.now()-c.since), 0))
	for {
		select {
		case <-wait:
		case <-c.ended:
			return
		}
		c.cancelled.Store(true)
		n := w.apis[w.dice.among(key, len(w.apis))]
		if p := n.enter(); p != nil {
			ctx, stop := context.WithTimeout(w.ctx, callTimeout)
			_, err := p.server.CancelOperation(ctx, &longrunningpb.CancelOperationRequest{Name: name})
			stop()
			p.calls.Done()
			w.trace(c.who(), "cancels %s at %s: %v", w.label(name), p.name, err)
			if err == nil {
				return
			}
			if status.Code(err) != codes.Unavailable && status.Code(err) != codes.DeadlineExceeded {
				w.violate("%s: CancelOperation: %v", c.who(), err)
				return
			}
		}
		wait = time.After(w.dice.between(key, 100*time.Millisecond, 3*time.Second))
	}
}

func (c *client) who() string { return fmt.Sprint("client", c.number) }

var errLeft = errors.New("the client has gone")

// attempt makes one call and reads it to its end: a response, or an error.
func (c *client) attempt(n *apiNode) (*repb.ExecuteResponse, error) {
	w := c.w
	began := w.now()
	st := c.open(n)
	if st == nil {
		w.excuse(n.node, "refuses connections")
		return nil, status.Error(codes.Unavailable, "connection refused")
	}
	defer st.hangUp()
	for {
		op, err := st.recv(c.gone)
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = status.Error(codes.Internal, "the stream ended without an end of the operation")
			}
			return nil, err
		}
		c.checkMessage(n, began, op)
		if !op.GetDone() {
			continue
		}
		res := &repb.ExecuteResponse{}
		if err := op.GetResponse().UnmarshalTo(res); err != nil {
			w.violate("%s: the response: %v", c.who(), err)
		}
		w.checkNotStale(c, n, op.GetResponse().GetValue())
		if _, err := st.recv(c.gone); err == nil {
			w.violate("%s: a message after the last", c.who())
		}
		return res, nil
	}
}

// judge says whether res is the end for the client, and checks that it is one
// that the plan explains.
func (c *client) judge(res *repb.ExecuteResponse) bool {
	w, code := c.w, codes.Code(res.GetStatus().GetCode())
	w.trace(c.who(), "ends with %s %.60s", code, res.GetStatus().GetMessage())
	w.ended(code)
	kind := c.action.kind
	switch code { //nolint:exhaustive // the others are below
	case codes.OK:
		c.checkResult(res.GetResult())
		return true
	case codes.DeadlineExceeded:
		if kind != hangs {
			w.violate("%s: action %d, which %s, timed out", c.who(), c.action.index, kind)
		}
		return true
	case codes.Canceled:
		if c.cancelled.Load() {
			return true
		}
	case codes.FailedPrecondition:
		if kind != lacks && !c.mayBeRefused(res.GetStatus().GetMessage()) {
			w.violate("%s: action %d, which %s: %s", c.who(), c.action.index, kind, res.GetStatus().GetMessage())
		}
		return true
	case codes.Internal:
		if !strings.HasPrefix(res.GetStatus().GetMessage(), queue.ReasonAttempts) {
			break
		}
		w.checkUsedUp(c, res.GetStatus().GetMessage())
		return true
	case codes.Unavailable:
		// A worker could not do its work, and says so.
		if !w.excusedAny("worker", c.since, w.now()) {
			w.violate("%s: unavailable, though all was well: %s", c.who(), res.GetStatus().GetMessage())
		}
		return false
	}
	w.violate("%s: action %d, which %s, ended with %s: %s", c.who(), c.action.index, kind, code, res.GetStatus().GetMessage())
	return true
}

func (c *client) checkResult(r *repb.ActionResult) {
	a := c.action
	if a.kind != succeeds && a.kind != fails && a.kind != uncached {
		c.w.violate("%s: action %d, which %s, has a result", c.who(), a.index, a.kind)
		return
	}
	out := ""
	for _, f := range r.GetOutputFiles() {
		if f.GetPath() == "out" {
			out = c.w.read(f.GetDigest())
		}
	}
	stdout := string(r.GetStdoutRaw())
	if stdout == "" {
		stdout = c.w.read(r.GetStdoutDigest())
	}
	if int(r.GetExitCode()) != a.exitCode() || stdout != a.output() || out != a.output() {
		c.w.violate("%s: action %d, which %s, has exit code %d, stdout %q, output %q", c.who(), a.index, a.kind, r.GetExitCode(), stdout, out)
	}
}

// refusedFor is for how long after something that was wrong with a worker its pool
// may be taken for one that is not there: a lifetime of its notices, and more.
const refusedFor = 2 * time.Minute

// mayBeRefused says whether a pool may have been taken for one that is not there.
func (c *client) mayBeRefused(message string) bool {
	from := c.w.now() - refusedFor
	return strings.Contains(message, platform.ErrUnsupported.Error()) &&
		(c.w.excusedAny("worker", from, c.w.now()) || c.w.excusedAny("api", from, c.w.now()))
}

// judgeBreak takes in a stream that broke.
func (c *client) judgeBreak(n *apiNode, err error) {
	w, s := c.w, status.Convert(err)
	w.trace(c.who(), "stream to %s ends: %s %.80s", n.node, s.Code(), s.Message())
	if s.Code() == codes.FailedPrecondition && c.mayBeRefused(s.Message()) {
		return
	}
	if s.Code() != codes.Unavailable {
		w.violate("%s: stream ended with %s: %s", c.who(), s.Code(), s.Message())
		c.name = ""
		return
	}
	if !w.excused(n.node, w.now()-time.Minute, w.now()) && !w.excused(c.who(), w.now()-time.Minute, w.now()) {
		w.violate("%s: stream to %s ended, though all was well: %s", c.who(), n.node, s.Message())
	}
}

// open calls Execute or WaitExecution; it returns nil if nobody is there.
func (c *client) open(n *apiNode) *stream {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := n.now
	if p == nil {
		return nil
	}
	key := c.who() + " " + n.node
	st := &stream{w: c.w, key: key, wake: make(chan struct{}, 1), room: make(chan struct{}, 1)}
	st.ctx, st.cut = context.WithCancel(c.w.ctx)
	name, d := c.name, c.w.digests[c.action.index]
	if c.name != "" {
		c.w.resumes()
	}
	c.w.trace(c.who(), "calls %s about %s", p.name, c.w.label(name))
	p.calls.Go(func() {
		var err error
		select {
		case <-time.After(c.w.dice.between(key, 100*time.Microsecond, 5*time.Millisecond)):
			if name == "" {
				err = p.server.Execute(&repb.ExecuteRequest{ActionDigest: d.Proto()}, st)
			} else {
				err = p.server.WaitExecution(&repb.WaitExecutionRequest{Name: name}, st)
			}
		case <-st.ctx.Done():
		}
		if err == nil {
			err = io.EOF
		}
		st.push(nil, err)
	})
	go func() { // ends with the call, at the latest
		select {
		case <-p.dead:
			st.fail("the connection was reset")
		case <-st.ctx.Done():
		}
	}()
	c.w.breakLater(st, c.who())
	return st
}

// A stream is a call as gRPC has it: what is sent arrives in order, or not at
// all once the connection is broken, which the two ends learn at different times.
type stream struct {
	grpc.ServerStream // nil: the handlers use nothing else of it

	w   *world
	key string
	ctx context.Context //nolint:containedctx // a stream has one
	cut context.CancelFunc

	mu     sync.Mutex // guards what follows
	items  []item
	last   time.Duration // when the last item arrives
	broken error         // what the client sees
	lost   bool          // nothing arrives any more

	wake, room chan struct{} // of capacity 1: a token says that there is an item, or room for one
}

type item struct {
	at  time.Duration
	op  *longrunningpb.Operation
	err error
}

// window is how many messages fit on the way: past it, Send waits for the client.
const window = 4

// Context implements grpc.ServerStream.
func (s *stream) Context() context.Context { return s.ctx }

// Send implements grpc.ServerStreamingServer.
func (s *stream) Send(op *longrunningpb.Operation) error {
	for {
		s.mu.Lock()
		full := len(s.items) >= window
		s.mu.Unlock()
		if !full {
			break
		}
		select {
		case <-s.room:
		case <-s.ctx.Done():
		}
		if s.ctx.Err() != nil {
			break
		}
	}
	if err := s.ctx.Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	s.push(op, nil)
	return nil
}

// push sends a message, or the end.
func (s *stream) push(op *longrunningpb.Operation, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lost {
		return
	}
	at := max(s.w.now()+s.w.dice.between(s.key, 100*time.Microsecond, 5*time.Millisecond), s.last+1)
	s.last = at
	s.items = append(s.items, item{at, op, err})
	token(s.wake)
}

// lose has nothing arrive any more.
func (s *stream) lose() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost = true
	s.items = nil
}

// fail is what the client sees of a connection that is broken.
func (s *stream) fail(why string) {
	s.mu.Lock()
	if s.broken == nil {
		s.broken = status.Error(codes.Unavailable, why)
	}
	s.mu.Unlock()
	token(s.wake)
}

func token(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default: // there is one
	}
}

// recv is the next message.
func (s *stream) recv(gone <-chan time.Time) (*longrunningpb.Operation, error) {
	for {
		s.mu.Lock()
		broken, wait := s.broken, time.Hour
		if len(s.items) > 0 {
			wait = s.items[0].at - s.w.now()
		}
		if broken == nil && wait <= 0 {
			i := s.items[0]
			s.items = s.items[1:]
			s.mu.Unlock()
			token(s.room)
			return i.op, i.err
		}
		s.mu.Unlock()
		if broken != nil {
			return nil, broken
		}
		timer := time.NewTimer(wait)
		select {
		case <-s.wake:
		case <-timer.C:
		case <-gone:
			timer.Stop()
			return nil, errLeft
		}
		timer.Stop()
	}
}

// hangUp ends the call for the server.
func (s *stream) hangUp() { s.cut() }
