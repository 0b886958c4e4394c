package gate

import (
	"context"
	"sync"
)

const (
	// maxUnsent is how much of what calls were answered may be on its way to a
	// client before more of its batches and trees are begun. A client that reads at
	// 10 Gbit/s a tenth of a second away has as much.
	maxUnsent = 64 << 20
	// minCounted is the least message that is counted: thousands of less are no
	// more than their calls take anyway.
	minCounted = 16 << 10
)

// unsent is what gRPC has of a connection's messages and could not send yet.
type unsent struct {
	mu    sync.Mutex
	bytes int64
	taken int64 // when some of it was sent last, or there was none, in ticks
	// answers are those of the bytes that end a call, and for which others wait. What
	// is of a stream is not among them: the stream waits for its client by itself, and on
	// the connection of an API server that client is one of many.
	answers int64
	room    chan struct{} // closed when the answers are less than maxUnsent; nil: nobody waits
}

// holdAnswer and holdPart count a message of n bytes, which ends a call or is one of
// a stream.
func (cn *conn) holdAnswer(n int) (freed func()) { return cn.hold(n, int64(n)) }
func (cn *conn) holdPart(n int) (freed func())   { return cn.hold(n, 0) }

func (cn *conn) hold(n int, answer int64) (freed func()) {
	if n < minCounted {
		return nil
	}
	u := &cn.unsent
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.bytes == 0 {
		u.taken = cn.gate.ticks.Load()
	}
	u.bytes += int64(n)
	u.answers += answer
	return func() { u.free(int64(n), answer, cn.gate.ticks.Load()) }
}

func (u *unsent) free(n, answer, tick int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.bytes -= n
	u.answers -= answer
	u.taken = tick
	if u.room != nil && u.answers < maxUnsent {
		close(u.room)
		u.room = nil
	}
}

// wait returns when there is room. The error is ctx's.
func (u *unsent) wait(ctx context.Context) error {
	for {
		u.mu.Lock()
		if u.answers < maxUnsent {
			u.mu.Unlock()
			return nil
		}
		if u.room == nil {
			u.room = make(chan struct{})
		}
		room := u.room
		u.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // a context's
		}
	}
}

// stuck is how much there is, and since when none of it was taken, in ticks.
func (u *unsent) stuck() (bytes, since int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.bytes, u.taken
}
