package nats

import (
	"context"
	"errors"
	"fmt"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A saying is what a worker of this process said of itself last, for listeners
// that begin later.
type saying struct {
	data  []byte
	until time.Time // then it holds no more
}

const (
	// maxSayings bounds Queue.sayings: workers in one process, of which there is
	// one but for tests.
	maxSayings = 1024
	// maxUnheard bounds the notices that came and that the listener has yet to
	// handle; those past it are lost. A fleet's workers say something every few
	// seconds each.
	maxUnheard = 1 << 14
)

// Notify implements queue.Notifier. Where there is no connection, it waits for
// one as long as Options.Timeout.
func (q *Queue) Notify(ctx context.Context, n *queuepb.Notice) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	data, err := proto.Marshal(n)
	if err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	if err := q.remember(n.GetWorker(), data); err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	err = q.try(ctx, callNotify, func(context.Context) error { return q.nc.Publish(q.noticeSubject(), data) })
	if err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	return nil
}

// remember keeps what a worker says, to repeat it to listeners that begin later.
func (q *Queue) remember(w *queuepb.WorkerState, data []byte) error {
	if w == nil {
		return nil
	}
	q.saidMu.Lock()
	defer q.saidMu.Unlock()
	if !q.answering {
		// From the first on, so that an API server, which says nothing of a
		// worker, is not asked.
		if _, err := q.nc.Subscribe(q.helloSubject(), q.onHello); err != nil {
			return q.classify(err)
		}
		q.answering = true
	}
	now := time.Now()
	for name, s := range q.sayings {
		if now.After(s.until) {
			delete(q.sayings, name)
		}
	}
	if w.GetState() == queuepb.WorkerState_GONE {
		delete(q.sayings, w.GetWorker())
	} else if d := w.GetLifetime().AsDuration(); d > 0 && len(q.sayings) < maxSayings {
		q.sayings[w.GetWorker()] = saying{data: data, until: now.Add(d)}
	}
	return nil
}

// onHello repeats to a listener that has just begun what it has missed.
func (q *Queue) onHello(m *natsgo.Msg) {
	// The mutex is held so that nothing older is said after something newer. It
	// guards nothing else, and what is published here is buffered.
	q.saidMu.Lock()
	defer q.saidMu.Unlock()
	now := time.Now()
	for _, s := range q.sayings {
		if now.After(s.until) {
			continue
		}
		if err := q.nc.Publish(q.noticeSubject()+"."+token(string(m.Data)), s.data); err != nil {
			q.log.Debug("could not repeat a notice", "listener", string(m.Data), "error", err)
		}
	}
}

// ListenNotices implements queue.Listener. A listener that begins, and one whose
// connection was lost, hears at once what the workers last said of themselves.
func (q *Queue) ListenNotices(ctx context.Context, id string, handle func(*queuepb.Notice)) error {
	leave, err := q.enter()
	if err == nil {
		defer leave()
		err = q.hear(ctx, id, handle)
	}
	if err == nil || ctx.Err() != nil && !errors.Is(err, queue.ErrClosed) {
		return nil
	}
	return fmt.Errorf("listen to notices for %s: %w", id, err)
}

func (q *Queue) hear(ctx context.Context, id string, handle func(*queuepb.Notice)) error {
	if !q.begin(q.listening, id) {
		return errors.New("there is a listener already")
	}
	defer q.end(q.listening, id)
	came := make(chan *natsgo.Msg, maxUnheard)
	for _, subject := range []string{q.noticeSubject(), q.noticeSubject() + "." + token(id)} {
		sub, err := q.nc.ChanSubscribe(subject, came)
		if err != nil {
			return q.classify(err)
		}
		defer sub.Unsubscribe() //nolint:errcheck // fails where the connection is gone, and the subscription with it
	}
	for {
		reconnected := q.reconnection()
		// Where this is lost, the workers speak up by themselves before long.
		if err := q.nc.Publish(q.helloSubject(), []byte(id)); err != nil {
			q.log.Debug("could not ask for notices", "error", err)
		}
		for again := false; !again; {
			select {
			case m := <-came:
				if ctx.Err() == nil {
					q.handleNotice(m, handle)
				}
			case <-reconnected:
				again = true
			case <-ctx.Done():
				return nil
			case <-q.done:
				return queue.ErrClosed
			}
		}
	}
}

func (q *Queue) handleNotice(m *natsgo.Msg, handle func(*queuepb.Notice)) {
	n := &queuepb.Notice{}
	if err := proto.Unmarshal(m.Data, n); err != nil {
		q.log.Error("a message that is no notice, dropping it", "subject", m.Subject, "error", err)
		return
	}
	handle(n)
}
