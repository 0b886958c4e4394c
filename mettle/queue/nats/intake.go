package nats

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"

	"github.com/mettle-build/mettle/mettle/queue"
)

// An intake asks the broker for jobs on behalf of all calls of Lease that name the
// same pools: so an idle process costs the broker one waiting request for each
// band of each pool, however many slots it has.
//
// A source whose jobs have run out has one request for one job wait there; it is
// left to wait when nobody needs it any more, to be of use to the next call. What
// it then brings goes back at once. Sources that have no such request are asked
// one after the other, the urgent ones first, for as many jobs as calls wait.
//
// We speak the protocol of pull requests ourselves, because the client library
// drops a message that is on its way when a caller leaves, and that job would be
// out of reach for a lease time.
type intake struct {
	q     *Queue
	inbox string
	// msgs is what the broker sends. It has room for more than can be asked for,
	// since what does not fit is lost until it is delivered again.
	msgs chan *natsgo.Msg
	wake chan struct{} // has room for one: waiters has grown

	mu      sync.Mutex // guards waiters; nothing is sent or awaited while it is held
	waiters []*waiter  // in the order in which they came

	// The rest belongs to run.
	sources  []*source
	byName   map[string]*source // by the consumer's name
	requests map[int]*source    // by the number of the request that is under way
	last     int                // numbers requests, to tell the answers apart
	heard    time.Time          // when the broker last said anything
	retry    <-chan time.Time   // ends source.broken
}

// A source is a band of a pool.
type source struct {
	pool  string
	band  int
	name  string // of the consumer
	state sourceState
	// empty: there was no job behind the last one that came.
	empty   bool
	request int       // that is under way
	left    int       // how many jobs it can still bring
	heard   time.Time // when it was made, or last gave a sign of life
}

// What is under way with a source.
type sourceState int

const (
	sourceIdle    sourceState = iota // nothing
	sourceAsked                      // a request for what is there
	sourceWaiting                    // a request that waits until something is
	sourceBroken                     // it did not want to serve us, and is left alone for a while
)

const (
	// maxUntaken is the room in intake.msgs.
	maxUntaken = 4096
	// maxBatch bounds what one request asks for.
	maxBatch = 256
)

func newIntake(q *Queue, pools []string) *intake {
	in := &intake{
		q: q, inbox: natsgo.InboxPrefix + nuid.Next(), msgs: make(chan *natsgo.Msg, maxUntaken), wake: make(chan struct{}, 1),
		byName: map[string]*source{}, requests: map[int]*source{},
	}
	for b := range bands {
		for _, pool := range pools {
			s := &source{pool: pool, band: b, name: consumerName(pool, b)}
			if in.byName[s.name] == nil {
				in.sources = append(in.sources, s)
				in.byName[s.name] = s
			}
		}
	}
	return in
}

// run asks for jobs and hands them out until the Queue is closed.
func (in *intake) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := in.q.onClose(cancel)
	defer stop()
	check := time.NewTicker(min(in.q.opts.Heartbeat, answerWithin))
	defer check.Stop()
	reconnected := in.q.reconnection()
	for {
		if err := in.tend(ctx); err != nil {
			in.fail(err)
		}
		select {
		case m := <-in.msgs:
			in.answer(m)
		case <-in.wake:
		case <-in.retry:
			in.retry = nil
			in.forget(sourceBroken)
		case <-reconnected:
			// The broker has forgotten what it was asked over the last one.
			reconnected = in.q.reconnection()
			in.forget(sourceAsked, sourceWaiting)
		case now := <-check.C:
			in.check(now)
		case <-in.q.done:
			return
		}
	}
}

// tend asks for jobs, if calls wait for some: one source at a time for what is
// there, and when there is no more, all of them for what comes.
func (in *intake) tend(ctx context.Context) error {
	n := in.waiting()
	if n == 0 {
		for _, s := range in.sources {
			if s.state == sourceIdle {
				s.empty = false // who knows, by the time that somebody asks
			}
		}
		return nil
	}
	for _, s := range in.sources {
		var err error
		switch {
		case s.state == sourceAsked:
			return nil // first its answer
		case s.state != sourceIdle:
		case s.empty:
			err = in.ask(ctx, s, 1)
		default:
			return in.askNow(ctx, s, min(n, maxBatch))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// pullRequest is the body of a request for messages.
type pullRequest struct {
	Batch     int           `json:"batch"`
	NoWait    bool          `json:"no_wait,omitempty"`
	Expires   time.Duration `json:"expires,omitempty"`
	Heartbeat time.Duration `json:"idle_heartbeat,omitempty"`
}

// waitFor is how long a request waits at the broker before it is made anew, in
// heartbeats.
const waitFor = 12

// ask asks a source for n jobs, whenever they come.
func (in *intake) ask(ctx context.Context, s *source, n int) error {
	beat := in.q.opts.Heartbeat
	return in.request(ctx, s, sourceWaiting, pullRequest{Batch: n, Expires: waitFor * beat, Heartbeat: beat})
}

// askNow asks a source for up to n of the jobs that are there.
func (in *intake) askNow(ctx context.Context, s *source, n int) error {
	return in.request(ctx, s, sourceAsked, pullRequest{Batch: n, NoWait: true})
}

func (in *intake) request(ctx context.Context, s *source, state sourceState, r pullRequest) error {
	if err := in.q.ensureConsumer(ctx, s.pool, s.band); err != nil {
		return err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	in.last++
	if err := in.q.nc.PublishRequest(in.q.nextSubject(s.name), in.inbox+"."+strconv.Itoa(in.last), data); err != nil {
		return fmt.Errorf("ask for jobs of %s: %w", s.pool, in.q.classify(err))
	}
	now := time.Now()
	if len(in.requests) == 0 {
		in.heard = now
	}
	in.requests[in.last] = s
	s.state, s.request, s.left, s.heard = state, in.last, r.Batch, now
	return nil
}

// ended takes note that the request of a source is no longer under way.
func (in *intake) ended(s *source, state sourceState) {
	delete(in.requests, s.request)
	s.state, s.request, s.left = state, 0, 0
}

// forget takes the requests of sources in these states for lost.
func (in *intake) forget(states ...sourceState) {
	for _, s := range in.sources {
		for _, state := range states {
			if s.state == state {
				in.ended(s, sourceIdle)
			}
		}
	}
}

// The broker's remarks on a request, as it numbers them.
const (
	statusHeartbeat = "100"
	statusNone      = "404" // no more are there, for a request that doesn't wait
	statusExpired   = "408" // or others wait for what is there
	// Others: the consumer or its server is going away, or there is none.
)

// reaskAfter is how long to leave a source alone that did not want to serve a
// request: a consumer is moving to another server.
const reaskAfter = 200 * time.Millisecond

// answer takes what the broker sends: a job, or a remark on a request.
func (in *intake) answer(m *natsgo.Msg) {
	in.heard = time.Now()
	if strings.HasPrefix(m.Reply, ackPrefix) {
		in.hand(m)
		return
	}
	n, err := strconv.Atoi(m.Subject[strings.LastIndexByte(m.Subject, '.')+1:])
	s := in.requests[n]
	if err != nil || s == nil {
		return // about a request that was taken for lost
	}
	s.heard = in.heard
	switch m.Header.Get("Status") {
	case statusHeartbeat:
	case statusNone, statusExpired:
		s.empty = true
		in.ended(s, sourceIdle)
	default:
		in.q.log.Debug("the broker does not serve a request", "consumer", s.name, "status", m.Header.Get("Status"), "description", m.Header.Get("Description"))
		in.q.forgetConsumer(s.pool, s.band)
		in.ended(s, sourceBroken)
		if in.retry == nil {
			in.retry = time.After(reaskAfter)
		}
	}
}

// ackPrefix tells a job from the broker's remarks.
const ackPrefix = "$JS.ACK."

// hand gives a job to the call that has waited longest. Which request brought it is
// not told; but there is no more than one under way for each source.
func (in *intake) hand(m *natsgo.Msg) {
	meta, err := m.Metadata()
	if err != nil {
		in.q.log.Error("a message that is none of JetStream's", "subject", m.Subject, "error", err)
		return
	}
	a := arrival{m, meta}
	if s := in.byName[meta.Consumer]; s != nil {
		s.empty, s.heard = meta.NumPending == 0, in.heard
		if s.left--; s.left <= 0 && s.request != 0 {
			in.ended(s, sourceIdle)
		}
	}
	if w := in.first(); w != nil {
		w.got <- outcome{arrival: a}
	} else {
		in.handBack(a)
	}
}

// answerWithin is how long to wait for the answer to a request for what is there.
// Past it, a server may be gone; while we wait at another we see whether one comes.
const answerWithin = time.Second

// check looks for requests that the broker doesn't seem to have.
func (in *intake) check(now time.Time) {
	beat, connected := in.q.opts.Heartbeat, in.q.nc.IsConnected()
	if silent := now.Sub(in.heard); len(in.requests) > 0 && silent > 2*beat+in.q.opts.Timeout {
		in.heard = now
		in.fail(fmt.Errorf("%w: nothing heard for %v", queue.ErrUnavailable, silent.Round(time.Millisecond)))
	}
	for _, s := range in.sources {
		patience := 2 * beat
		if s.state == sourceAsked {
			patience = min(patience, answerWithin)
		}
		if s.request != 0 && now.Sub(s.heard) > patience && connected {
			s.empty = true // if it is not, the request that waits brings what is there
			in.ended(s, sourceIdle)
		}
	}
}
