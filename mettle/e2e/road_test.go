package e2e_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// A road carries TCP connections to one of several addresses, in turn, as a
// balancer does: one where nobody listens is passed over. It can be cut, so that
// nothing passes and nobody is told, as when a network is partitioned.
type road struct {
	listener net.Listener
	wg       sync.WaitGroup

	// mu guards the rest.
	mu       sync.Mutex
	open     *sync.Cond
	cut      bool
	closed   bool
	backends []string
	next     int
	conns    map[net.Conn]bool
}

// newRoad makes a road to backends, which ends with the test.
func newRoad(t *testing.T, backends ...string) *road {
	t.Helper()
	return newRoadFrom(t, "127.0.0.1", backends...)
}

// newRoadFrom is newRoad, beginning at another address of this machine.
func newRoadFrom(t *testing.T, host string, backends ...string) *road {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	r := &road{listener: l, backends: backends, conns: map[net.Conn]bool{}}
	r.open = sync.NewCond(&r.mu)
	r.wg.Go(func() { r.accept(t.Context()) })
	t.Cleanup(func() {
		_ = l.Close()
		r.mu.Lock()
		r.closed = true
		r.open.Broadcast()
		for c := range r.conns {
			_ = c.Close()
		}
		r.mu.Unlock()
		r.wg.Wait()
	})
	return r
}

// Addr is where the road begins, host:port.
func (r *road) Addr() string { return r.listener.Addr().String() }

// Cut lets nothing pass until Mend.
func (r *road) Cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = true
}

// Mend lets pass again what was on its way, and all that follows.
func (r *road) Mend() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = false
	r.open.Broadcast()
}

// pass waits while the road is cut, and reports whether it still is there.
func (r *road) pass() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.cut && !r.closed {
		r.open.Wait()
	}
	return !r.closed
}

func (r *road) accept(ctx context.Context) {
	for {
		c, err := r.listener.Accept()
		if err != nil {
			return
		}
		r.wg.Go(func() { r.serve(ctx, c) })
	}
}

func (r *road) serve(ctx context.Context, c net.Conn) {
	defer c.Close()
	if !r.track(c) || !r.pass() {
		return
	}
	defer r.untrack(c)
	to, err := r.dial(ctx)
	if err != nil {
		return
	}
	defer to.Close()
	if !r.track(to) {
		return
	}
	defer r.untrack(to)
	var both sync.WaitGroup
	for _, pair := range [][2]net.Conn{{c, to}, {to, c}} {
		both.Go(func() {
			r.carry(pair[0], pair[1])
			_, _ = pair[0].Close(), pair[1].Close()
		})
	}
	both.Wait()
}

func (r *road) carry(from, to net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if !r.pass() {
			return
		}
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return // also at the end of one direction: gRPC and NATS need both
		}
	}
}

// dial connects to the next backend that answers.
func (r *road) dial(ctx context.Context) (net.Conn, error) {
	r.mu.Lock()
	first := r.next
	r.next++
	backends := r.backends
	r.mu.Unlock()
	dialer := net.Dialer{Timeout: time.Second}
	err := io.EOF
	for i := range backends {
		c, e := dialer.DialContext(ctx, "tcp", backends[(first+i)%len(backends)])
		if e == nil {
			return c, nil
		}
		err = errors.Join(err, e)
	}
	return nil, err
}

func (r *road) track(c net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.conns[c] = true
	return true
}

func (r *road) untrack(c net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
}
