package gate

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/elan/wire"
)

// errStalled is why a call was ended.
var errStalled = errors.New("the client has neither sent nor taken anything for too long")

// memoryError is why another one was.
type memoryError struct{}

func (memoryError) Error() string {
	return "the server's memory is short, and this client has the most calls that wait; try again later, with fewer at once"
}

// Is has it be a cancellation to those who look.
func (memoryError) Is(target error) bool { return target == context.Canceled }

// tryLater is how long clients are asked to wait that are refused for the memory. By
// that they can tell it from storage that is full: RESOURCE_EXHAUSTED too.
const tryLater = time.Second

// shortOfMemory is the status of what is refused or ended for the memory.
func shortOfMemory() error {
	s := status.New(codes.ResourceExhausted, memoryError{}.Error())
	if d, err := s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(tryLater)}); err == nil {
		s = d
	}
	return s.Err() //nolint:wrapcheck // it is the status
}

// conn is what is known of one connection.
type conn struct {
	client *client
	gate   *Gate
	ends   ends
	calls  atomic.Int64                 // those that count for its share
	places [len(placesOf)]chan struct{} // have a value for each call of a kind that is at work
	close  func()                       // closes it; nil: nobody can
	unsent unsent

	mu          sync.Mutex // guards the list
	first, last *call      // in the order in which they came
}

func newConn(g *Gate, c *client) *conn {
	cn := &conn{client: c, gate: g}
	for k := range cn.places {
		if n := places(Kind(k), g.o.MaxMemoryBytes); n > 0 { //nolint:gosec // there are few
			cn.places[k] = make(chan struct{}, n)
		}
	}
	return cn
}

// call is one that is going on.
type call struct {
	conn   *conn
	ctx    context.Context //nolint:containedctx // that of the call, to see its end
	cancel context.CancelCauseFunc
	kind   Kind

	// since when it waits for its client to send or to take something, in ticks; 0
	// where it does not.
	receives, sends atomic.Int64
	queued          atomic.Bool // it waits for its turn, and its message in gRPC's buffers
	patient         atomic.Bool
	placed          atomic.Bool // it has one of the conn's places

	prev, next *call // in the conn's list, guarded by its mu
	ended      bool  // likewise
	lasting    bool  // likewise: it does not count for the conn's share
}

type callKey struct{}

// callContext is the context of a call. What gRPC sends to the client, where it
// waits for it when the call is ended, is made of Err: DEADLINE_EXCEEDED, or
// INTERNAL with the reason.
type callContext struct {
	context.Context //nolint:containedctx // it is one
	call            *call
}

// Err implements context.Context.
func (c *callContext) Err() error {
	err := c.Context.Err()
	if err == nil {
		return nil
	}
	switch cause := context.Cause(c.Context); {
	case errors.Is(cause, errStalled):
		return context.DeadlineExceeded
	case errors.Is(cause, memoryError{}):
		return cause
	}
	return err
}

// Value implements context.Context.
func (c *callContext) Value(key any) any {
	if key == (callKey{}) {
		return c.call
	}
	return c.Context.Value(key)
}

func callOf(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

// Patient lets the client of the call of ctx be silent for as long as it likes.
func Patient(ctx context.Context) {
	if c := callOf(ctx); c != nil {
		c.patient.Store(true)
		c.lasts()
	}
}

// lasts has a call not count for its connection's share any more: it is there for as
// long as an action runs, and takes next to nothing.
func (c *call) lasts() {
	c.conn.mu.Lock()
	defer c.conn.mu.Unlock()
	if !c.ended && !c.lasting {
		c.lasting = true
		c.conn.calls.Add(-1)
	}
}

// tap sees a call before its first message is received. It runs in the goroutine
// that reads the connection.
func (g *Gate) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	kind, served := g.methods[info.FullMethodName]
	if !served {
		return ctx, nil
	}
	if g.o.Admit != nil {
		if err := g.o.Admit(ctx, info.FullMethodName); err != nil {
			return ctx, err
		}
	}
	cn := g.connOf(ctx)
	if cn.calls.Load() >= g.share.Load() {
		g.metrics.turnedAway.Inc()
		return ctx, shortOfMemory()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	c := &call{conn: cn, ctx: ctx, cancel: cancel, kind: kind}
	cn.add(c)
	return &callContext{ctx, c}, nil
}

// connOf is the connection of a call.
func (g *Gate) connOf(ctx context.Context) *conn {
	if p, ok := peer.FromContext(ctx); ok {
		if e, ok := endsOf(p.Addr, p.LocalAddr); ok {
			g.mu.RLock()
			defer g.mu.RUnlock()
			if c := g.conns[e]; c != nil {
				return c
			}
		}
	}
	return g.others
}

// add takes c into the list. Until it is handled, it waits for its client.
func (cn *conn) add(c *call) {
	c.receives.Store(cn.gate.ticks.Load())
	cn.calls.Add(1)
	cn.gate.calls.Add(1)
	cn.mu.Lock()
	defer cn.mu.Unlock()
	c.prev = cn.last
	if cn.last != nil {
		cn.last.next = c
	} else {
		cn.first = c
	}
	cn.last = c
}

// end takes c out of the list.
func (c *call) end() {
	c.conn.mu.Lock()
	defer c.conn.mu.Unlock()
	c.endLocked()
}

// endLocked is end for a caller that has the conn's mu.
func (c *call) endLocked() {
	if c.ended {
		return
	}
	c.ended = true
	if c.prev != nil {
		c.prev.next = c.next
	} else {
		c.conn.first = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	} else {
		c.conn.last = c.prev
	}
	if !c.lasting {
		c.conn.calls.Add(-1)
	}
	c.conn.gate.calls.Add(-1)
}

// waitsSince is since when the client keeps the call waiting; 0: it does not.
func (c *call) waitsSince() int64 {
	r, s := c.receives.Load(), c.sends.Load()
	switch {
	case r == 0 || s != 0 && s < r:
		return s
	default:
		return r
	}
}

// stalled are the calls that wait since limit or before, and whether there are
// others. Those that have ended without having been handled are taken out. Those that
// wait since lend or before have the others of the connection use their places, for
// these may be of other clients, whose calls a proxy or an API server passes on.
func (cn *conn) stalled(limit, lend int64) (stalled []*call, others bool) {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	for c := cn.first; c != nil; {
		next := c.next
		since := c.waitsSince()
		if since != 0 && since <= lend {
			c.leave()
		}
		switch {
		case c.ctx.Err() != nil:
			c.endLocked()
		case since != 0 && since <= limit && !c.patient.Load():
			stalled = append(stalled, c)
		default:
			others = true
		}
		c = next
	}
	return stalled, others
}

// youngest are the calls of a kind, the youngest first.
func (cn *conn) youngest(kind func(*call) bool) []*call {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	var calls []*call
	for c := cn.last; c != nil; c = c.prev {
		if c.ctx.Err() == nil && kind(c) {
			calls = append(calls, c)
		}
	}
	return calls
}

// waits reports whether c waits for its client or for its turn, and so has nothing
// but what it has received, or what it has to send.
func waits(c *call) bool { return c.queued.Load() || c.waitsSince() != 0 }

// receive calls f, which waits for the client to send something.
func (c *call) receive(f func() error) error {
	c.receives.Store(c.conn.gate.ticks.Load())
	err := f()
	c.receives.Store(0)
	return c.explain(err)
}

// explain is err, or the status that says why the call was ended.
func (c *call) explain(err error) error {
	if err == nil || c.ctx.Err() == nil {
		return err
	}
	switch cause := context.Cause(c.ctx); {
	case errors.Is(cause, errStalled):
		return status.Errorf(codes.DeadlineExceeded, "%v: %v", cause, c.conn.gate.o.Stall.Round(time.Second))
	case errors.Is(cause, memoryError{}):
		return shortOfMemory()
	}
	return err
}

// enter waits until the call may begin its work: until it is its turn, and the
// client has taken what was answered before. The error is a status. After it, the
// caller calls leave.
func (c *call) enter() error {
	c.receives.Store(0)
	places := c.conn.places[c.kind]
	if places == nil {
		return nil
	}
	c.queued.Store(true)
	defer c.queued.Store(false)
	select {
	case places <- struct{}{}:
	case <-c.ctx.Done():
		return c.explain(status.FromContextError(c.ctx.Err()).Err())
	}
	c.queued.Store(false)
	c.sends.Store(c.conn.gate.ticks.Load())
	defer c.sends.Store(0)
	if err := c.conn.unsent.wait(c.ctx); err != nil {
		<-places
		return c.explain(status.FromContextError(err).Err())
	}
	c.placed.Store(true)
	return nil
}

// leave gives the call's place to another, if it still has one. It never waits.
func (c *call) leave() {
	if c.placed.CompareAndSwap(true, false) {
		<-c.conn.places[c.kind]
	}
}

// Registrar registers services with s so that their calls pass the gate. All are
// registered before s serves.
func (g *Gate) Registrar(s grpc.ServiceRegistrar) grpc.ServiceRegistrar { return registrar{g, s} }

type registrar struct {
	gate *Gate
	next grpc.ServiceRegistrar
}

// RegisterService implements grpc.ServiceRegistrar.
func (r registrar) RegisterService(desc *grpc.ServiceDesc, impl any) {
	d := *desc
	d.Methods, d.Streams = slices.Clone(desc.Methods), slices.Clone(desc.Streams)
	for i := range d.Methods {
		r.know(d.ServiceName, d.Methods[i].MethodName)
		d.Methods[i].Handler = unary(d.Methods[i].Handler)
	}
	for i := range d.Streams {
		r.know(d.ServiceName, d.Streams[i].StreamName)
		d.Streams[i].Handler = streaming(d.Streams[i].Handler)
	}
	r.next.RegisterService(&d, impl)
}

func (r registrar) know(service, method string) {
	full := "/" + service + "/" + method
	r.gate.methods[full] = r.gate.o.Kinds[full]
}

// unary is h behind the gate: it is there before the message is received.
func unary(h grpc.MethodHandler) grpc.MethodHandler {
	return func(srv any, ctx context.Context, dec func(any) error, i grpc.UnaryServerInterceptor) (any, error) {
		c := callOf(ctx)
		if c == nil {
			return h(srv, ctx, dec, i)
		}
		defer c.end()
		if err := c.enter(); err != nil {
			return nil, err
		}
		answered := false
		defer func() {
			if !answered {
				c.leave()
			}
		}()
		reply, err := h(srv, ctx, func(m any) error { return c.receive(func() error { return dec(m) }) }, i)
		if err != nil || c.conn.places[c.kind] == nil {
			return reply, err
		}
		// The next one begins when this answer counts, which gRPC encodes now.
		answered = true
		return &wire.Counted{Message: reply, Held: func(n int) func() {
			defer c.leave()
			return c.conn.holdAnswer(n)
		}}, nil
	}
}

// streaming is h behind the gate.
func streaming(h grpc.StreamHandler) grpc.StreamHandler {
	return func(srv any, ss grpc.ServerStream) error {
		c := callOf(ss.Context())
		if c == nil {
			return h(srv, ss)
		}
		defer c.end()
		if err := c.enter(); err != nil {
			return err
		}
		defer c.leave()
		return c.explain(h(srv, &stream{ServerStream: ss, call: c}))
	}
}

// stream notes when it waits for the client.
type stream struct {
	grpc.ServerStream
	call     *call
	answered bool // something was sent
}

// RecvMsg implements grpc.ServerStream.
func (s *stream) RecvMsg(m any) error {
	return s.call.receive(func() error { return s.ServerStream.RecvMsg(m) })
}

// SendMsg implements grpc.ServerStream.
func (s *stream) SendMsg(m any) error {
	s.call.sends.Store(s.call.conn.gate.ticks.Load())
	err := s.ServerStream.SendMsg(&wire.Counted{Message: m, Held: s.call.conn.holdPart})
	s.call.sends.Store(0)
	if !s.answered {
		s.answered = true
		if s.call.kind == Long {
			s.call.lasts()
		}
	}
	return s.call.explain(err)
}
