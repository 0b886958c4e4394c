//go:build linux

package sim_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A port is what one process has of the broker: a client library.
type port struct {
	b *broker
	p *process

	mu    sync.Mutex // guards known
	known map[string]*known
}

// known is what the port of an API server remembers of an operation, where jobs
// are apart: without it, an older delivery's reports would count.
type known struct {
	publications []uint64
	base         uint32
	withdrawn    bool
	ended        bool
	attempt      uint32
}

// generation is how much the base of attempts rises with each withdrawal.
const generation = 1000

func newPort(b *broker, p *process) *port {
	return &port{b: b, p: p, known: make(map[string]*known)}
}

var _ queue.Broker = (*port)(nil)

// nothing is the value of calls that have none.
type nothing struct{}

// do calls the broker.
func (o *port) do(ctx context.Context, what string, f func()) error {
	_, err := call(ctx, o.p, &o.b.service, what, func() (nothing, error) { f(); return nothing{}, nil })
	return o.explain(what, err)
}

// explain gives an error the class that callers know.
func (o *port) explain(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errGone):
		return fmt.Errorf("%s: %w: %w", what, queue.ErrClosed, err)
	case errors.Is(err, errNet):
		o.b.w.excuse(o.p.node, "a call of the broker failed")
		return fmt.Errorf("%s: %w: %w", what, queue.ErrUnavailable, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Publish implements queue.Publisher.
func (o *port) Publish(ctx context.Context, msg *queuepb.Job) error {
	w, name := o.b.w, msg.GetOperation()
	o.mu.Lock()
	k := o.operation(name)
	if k.withdrawn {
		*k = known{base: k.base + generation}
	}
	if k.ended {
		*k = known{base: k.base}
	}
	publication := w.dice.roll("publication " + o.p.name)
	k.publications = append(k.publications, publication)
	w.asksAnew(o.p, name)
	base := k.base
	o.mu.Unlock()
	if w.plan.kind == sharedJobs {
		base = 0
	}
	if w.mutation == losePublish && w.dice.chance("mutation", 0.2) {
		return nil
	}
	return o.do(ctx, "publish "+w.label(name), func() { o.b.publish(as(o.p, msg), publication, base) })
}

// operation finds or makes what is known of one. The mutex is held.
func (o *port) operation(name string) *known {
	k := o.known[name]
	if k == nil {
		k = &known{}
		o.known[name] = k
	}
	return k
}

// Cancel implements queue.Publisher.
func (o *port) Cancel(ctx context.Context, name string) error {
	o.mu.Lock()
	k := o.operation(name)
	publications := k.publications
	k.publications, k.withdrawn = nil, true
	o.mu.Unlock()
	return o.do(ctx, "cancel "+o.b.w.label(name), func() { o.b.cancel(name, publications) })
}

// pullTime is how long one request for a job waits at the broker.
const pullTime = 20 * time.Second

// Lease implements queue.Consumer.
func (o *port) Lease(ctx context.Context, pools []string) (queue.Lease, error) {
	for {
		wt := &waiter{p: o.p, pools: pools, given: make(chan *handle, 1)}
		if err := o.do(ctx, "pull", func() { o.b.wait(wt) }); err != nil {
			o.leave(wt)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, err
		}
		timer := time.NewTimer(pullTime)
		select {
		case h := <-wt.given:
			timer.Stop()
			return o.begin(h), nil
		case <-timer.C:
			o.leave(wt)
		case <-o.p.dead:
			timer.Stop()
			return nil, fmt.Errorf("pull: %w: %w", queue.ErrClosed, errGone)
		case <-ctx.Done():
			timer.Stop()
			o.leave(wt)
			return nil, ctx.Err()
		}
	}
}

// leave gives up a pull. What it was given, or will be, goes back.
func (o *port) leave(wt *waiter) {
	o.b.mu.Lock()
	wt.left = true
	o.b.mu.Unlock()
	select {
	case h := <-wt.given:
		o.b.refuse(h.l)
	default:
	}
	o.b.w.send("unpull", o.p.node, &o.b.service, func() { o.b.unwait(wt) }, nil)
}

// SendUpdate implements queue.Sender.
func (o *port) SendUpdate(ctx context.Context, replyTo string, u *queuepb.Update) error {
	w := o.b.w
	if w.mutation == ackFirst && u.GetStage() == queuepb.Update_COMPLETED {
		o.ackEarly(ctx, u)
	}
	return o.do(ctx, fmt.Sprintf("update %s %s", w.label(u.GetOperation()), u.GetStage()), func() {
		for _, u := range o.p.saysMore(as(o.p, u)) {
			o.b.update(replyTo, u)
		}
	})
}

// ReceiveUpdates implements queue.Receiver.
func (o *port) ReceiveUpdates(ctx context.Context, id string, handle func(*queuepb.Update)) error {
	r := &receiver{p: o.p, wake: make(chan struct{}, 1)}
	if err := o.do(ctx, "receive", func() { o.b.receive(id, r) }); err != nil {
		o.b.unreceive(id, r, true)
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	for {
		for _, u := range o.b.fetch(r) {
			if ctx.Err() != nil {
				break
			}
			o.b.w.checkStale(o.p, u)
			if u = o.fresh(u); u != nil {
				o.b.w.trace(o.p.name, "hears of %s, attempt %d: %s", o.b.w.label(u.GetOperation()), u.GetAttempt(), u.GetStage())
				handle(as(o.p, u))
			}
		}
		select {
		case <-r.wake:
		case <-o.p.dead:
			return fmt.Errorf("receive: %w: %w", queue.ErrClosed, errGone)
		case <-ctx.Done():
			last, stop := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
			defer stop()
			return o.do(last, "unreceive", func() { o.b.unreceive(id, r, false) })
		}
	}
}

// fresh is what an API server sees of an update, nil where it says nothing new.
// Where jobs are apart, a result counts whichever delivery it is of, because the
// job has been acknowledged.
func (o *port) fresh(u *queuepb.Update) *queuepb.Update {
	if o.b.w.mutation == noFencing {
		return o.b.w.unfenced(o.p, u)
	}
	if o.b.w.plan.kind == sharedJobs {
		return u
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	k := o.operation(u.GetOperation())
	if k.ended || u.GetAttempt() <= k.base {
		return nil
	}
	if u.GetStage() == queuepb.Update_COMPLETED {
		k.ended = true
		if u.GetAttempt() < k.attempt {
			u = &queuepb.Update{
				Operation: u.GetOperation(), Attempt: k.attempt, Worker: u.GetWorker(), Stage: u.GetStage(), ExecuteResponse: u.GetExecuteResponse(),
			}
		}
		return u
	}
	if u.GetAttempt() < k.attempt {
		return nil
	}
	k.attempt = u.GetAttempt()
	return u
}

// Notify implements queue.Notifier. What the broker can be told, it need not
// confirm.
func (o *port) Notify(ctx context.Context, n *queuepb.Notice) error {
	n = as(o.p, n)
	if o.p.peer != nil && o.p.peer.name == toCome { // about something that nobody knows
		unknown := &queuepb.Notice{}
		_ = more(unknown)
		o.b.notify(o.p.name, unknown)
	}
	if o.b.w.isCut(o.p.node, &o.b.service) || o.b.w.isDown(&o.b.service) || !o.p.alive() {
		return o.do(ctx, "notify in vain", func() { o.b.notify(o.p.name, n) })
	}
	o.b.notify(o.p.name, n)
	return nil
}

// ListenNotices implements queue.Listener.
func (o *port) ListenNotices(ctx context.Context, _ string, handle func(*queuepb.Notice)) error {
	e := &ear{p: o.p, said: make(chan *queuepb.Notice, maxSaid)}
	if err := o.do(ctx, "listen", func() { o.b.listen(e) }); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer o.b.unlisten(e)
	for {
		select {
		case n := <-e.said:
			handle(as(o.p, n))
		case <-o.p.dead:
			return fmt.Errorf("listen: %w: %w", queue.ErrClosed, errGone)
		case <-ctx.Done():
			return nil
		}
	}
}

// Ready implements queue.Broker.
func (o *port) Ready(ctx context.Context) error { return o.do(ctx, "ready", func() {}) }

// Close implements queue.Broker.
func (o *port) Close() error { return nil }
