//go:build linux

package sim_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// A process is one life of an API server or a worker.
type process struct {
	w    *world
	node string // its place: the next process there has the same
	name string // its own
	peer *peer
	dead chan struct{}
	once sync.Once
}

func (w *world) newProcess(node string, life int) *process {
	name := fmt.Sprintf("%s.%d", node, life)
	return &process{w: w, node: node, name: name, peer: w.newPeer(name), dead: make(chan struct{})}
}

// kill ends it as kill -9 does: nothing that it does from now on has an effect.
// What it has sent may still arrive.
func (p *process) kill() { p.once.Do(func() { close(p.dead) }) }

func (p *process) alive() bool {
	select {
	case <-p.dead:
		return false
	default:
		return true
	}
}

// A service is what processes call: the broker, the store.
type service struct {
	name string
	// The rest is guarded by world.mu.
	down, slow bool
}

// callTimeout bounds a call with all its tries, and tryTimeout one of them, as
// in the brokers and in Elan's client. Both are less by up to a tenth, so that no
// other timer fires at the same moment: the bubble fires those in any order.
const (
	callTimeout = 10 * time.Second
	tryTimeout  = 3 * time.Second
)

var (
	errGone = errors.New("this process is dead")
	errNet  = errors.New("no answer")
)

// reply is what a call comes back with.
type reply[T any] struct {
	value T
	err   error
}

// call has f run at a service, at least once if the error is nil, and more often
// if replies are lost. The error is f's, or wraps errNet.
func call[T any](ctx context.Context, p *process, to *service, what string, f func() (T, error)) (T, error) {
	key := p.node + " " + to.name + " " + what
	ctx, stop := context.WithTimeout(ctx, p.w.dice.between(key+" timeout", callTimeout*9/10, callTimeout))
	defer stop()
	for {
		v, err := try(ctx, p, to, key, f)
		if !errors.Is(err, errNet) || !p.alive() || ctx.Err() != nil {
			return v, err
		}
		select {
		case <-time.After(p.w.dice.between(key, 100*time.Millisecond, time.Second)):
		case <-ctx.Done():
			return v, err
		case <-p.dead:
			return v, errGone
		}
	}
}

// try is one try of call. The request arrives, if it does, whatever becomes of
// the caller.
func try[T any](ctx context.Context, p *process, to *service, key string, f func() (T, error)) (T, error) {
	var none T
	if !p.alive() {
		return none, errGone
	}
	w := p.w
	answered := make(chan reply[T], 1) // so that it is sent whether or not somebody waits
	w.send(key, p.node, to, func() {
		v, err := f()
		w.send(key+" reply", p.node, to, func() { answered <- reply[T]{v, err} }, nil)
	}, func() { answered <- reply[T]{none, fmt.Errorf("%w: %s refuses connections", errNet, to.name)} })
	timer := time.NewTimer(w.dice.between(key+" timeout", tryTimeout*9/10, tryTimeout))
	defer timer.Stop()
	select {
	case r := <-answered:
		if !p.alive() {
			return none, errGone
		}
		return r.value, r.err
	case <-timer.C:
		return none, fmt.Errorf("%w from %s in %v", errNet, to.name, tryTimeout)
	case <-ctx.Done():
		return none, fmt.Errorf("%w from %s: %v", errNet, to.name, ctx.Err()) //nolint:errorlint // it is the call that took too long, not the caller
	case <-p.dead:
		return none, errGone
	}
}

// send has arrive be called when a message arrives that is sent now between a node and a
// service, if it does. Where it can be told that it does not, refused is called.
func (w *world) send(key, node string, to *service, arrive, refused func()) {
	if refused == nil {
		refused = func() {}
	}
	after := w.dice.between(key, 200*time.Microsecond, 3*time.Millisecond)
	lost := false
	if w.unsettled() {
		if w.plan.faults.has(delays) && w.dice.chance(key+" late", 0.05) {
			after = w.dice.between(key, 10*time.Millisecond, 8*time.Second)
			w.excuse(node, "a late message")
		}
		lost = w.plan.faults.has(losses) && w.dice.chance(key+" lost", 0.03)
	}
	if w.isSlow(to) {
		after += w.dice.between(key, 100*time.Millisecond, 4*time.Second)
	}
	time.AfterFunc(after, func() {
		switch {
		case lost:
			w.excuse(node, "a lost message")
		case w.isCut(node, to): // silence
		case w.isDown(to):
			refused()
		default:
			arrive()
		}
	})
}

func (w *world) isCut(node string, to *service) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cuts[cut{node, to.name}] > 0
}

func (w *world) isDown(to *service) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return to.down
}

func (w *world) isSlow(to *service) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return to.slow
}

// cut names the line between a node and a service.
type cut struct{ node, service string }

// unsettled says that things may still go wrong.
func (w *world) unsettled() bool { return w.now() < w.plan.horizon }
