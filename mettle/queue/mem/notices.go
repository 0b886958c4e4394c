package mem

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// An ear is what one API server has yet to hear of the notices. Its pending ones
// are guarded by Queue.mu.
type ear struct {
	pending []*queuepb.Notice
	wake    chan struct{} // of capacity 1: a token says that pending is not empty
}

// maxNotices bounds ear.pending. Past it the oldest are lost, as the contract
// allows: who depends on a notice says it again.
const maxNotices = 1 << 16

// A saying is what a worker said of itself last, for listeners that begin later.
type saying struct {
	notice *queuepb.Notice
	until  time.Time // then it holds no more
}

// remember keeps what a worker says. The mutex is held.
func (q *Queue) remember(n *queuepb.Notice) {
	w := n.GetWorker()
	if w == nil {
		return
	}
	if w.GetState() == queuepb.WorkerState_GONE {
		delete(q.sayings, w.GetWorker())
		return
	}
	if d := w.GetLifetime().AsDuration(); d > 0 && (len(q.sayings) < maxNotices || q.sayings[w.GetWorker()].notice != nil) {
		q.sayings[w.GetWorker()] = saying{n, time.Now().Add(d)}
	}
}

// repeat is what the workers say that are there. The mutex is held.
func (q *Queue) repeat() []*queuepb.Notice {
	var out []*queuepb.Notice
	now := time.Now()
	for name, s := range q.sayings {
		if now.After(s.until) {
			delete(q.sayings, name)
			continue
		}
		out = append(out, s.notice)
	}
	return out
}

// Notify implements queue.Notifier. It never blocks.
func (q *Queue) Notify(ctx context.Context, n *queuepb.Notice) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return fmt.Errorf("notify: %w", queue.ErrClosed)
	}
	q.remember(n)
	for _, e := range q.ears {
		if len(e.pending) >= maxNotices {
			e.pending = append(e.pending[:0], e.pending[maxNotices/2:]...)
		}
		e.pending = append(e.pending, n)
		select {
		case e.wake <- struct{}{}:
		default: // there is a token
		}
	}
	return nil
}

// ListenNotices implements queue.Listener. A second listener of the same id is
// an error.
func (q *Queue) ListenNotices(ctx context.Context, id string, handle func(*queuepb.Notice)) error {
	e := &ear{wake: make(chan struct{}, 1)}
	if err := q.addEar(id, e); err != nil {
		return fmt.Errorf("listen to notices for %s: %w", id, err)
	}
	defer func() {
		q.mu.Lock()
		delete(q.ears, id)
		q.mu.Unlock()
	}()
	for {
		select {
		case <-e.wake:
		case <-ctx.Done():
			return nil
		case <-q.done:
			return fmt.Errorf("listen to notices for %s: %w", id, queue.ErrClosed)
		}
		q.mu.Lock()
		pending := e.pending
		e.pending = nil
		q.mu.Unlock()
		for _, n := range pending {
			if ctx.Err() != nil {
				return nil
			}
			handle(n)
		}
	}
}

func (q *Queue) addEar(id string, e *ear) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return queue.ErrClosed
	}
	if q.ears[id] != nil {
		return errors.New("there is a listener already")
	}
	q.ears[id] = e
	if e.pending = q.repeat(); len(e.pending) > 0 {
		e.wake <- struct{}{} // it is new: there is room
	}
	return nil
}
