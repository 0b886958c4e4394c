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

// A source is a band of a pool.
type source struct {
	pool string
	band int
}

// A puller asks the broker for one job on behalf of one call of Lease. It first
// asks each band for what is there, the urgent one first, and then has all of
// them wait. What arrives beside the one job that it takes goes back at once.
//
// We speak the protocol of pull requests ourselves, because the client library
// drops a message that is on its way when a caller leaves, and that job would be
// out of reach for a lease time.
type puller struct {
	q       *Queue
	sources []source
	inbox   string
	sub     *natsgo.Subscription
	// msgs has room for an answer of each kind from each source. Its sender
	// does not block.
	msgs chan *natsgo.Msg

	mu     sync.Mutex
	closed bool

	// The rest belongs to the goroutine that calls Lease.
	last    int         // counts requests, to tell the answers apart
	pending map[int]int // the source, by request
	heard   time.Time   // when the broker last said anything
}

// pull waits for a message with a job.
func (q *Queue) pull(ctx context.Context, pools []string) (*natsgo.Msg, error) {
	if err := q.awaitConnection(ctx); err != nil {
		return nil, err
	}
	p, err := q.newPuller(pools)
	if err != nil {
		return nil, err
	}
	defer p.close()
	m, err := p.poll(ctx)
	if err == nil && m == nil {
		m, err = p.wait(ctx)
	}
	return m, err
}

// awaitConnection waits for the connection to come back, for as long as
// Options.Timeout.
func (q *Queue) awaitConnection(ctx context.Context) error {
	reconnected := q.reconnection()
	if q.nc.IsConnected() {
		return nil
	}
	timer := time.NewTimer(q.opts.Timeout)
	defer timer.Stop()
	select {
	case <-reconnected:
		return nil
	case <-timer.C:
		return fmt.Errorf("%w: not connected", queue.ErrUnavailable)
	case <-ctx.Done():
		return ctx.Err()
	case <-q.done:
		return queue.ErrClosed
	}
}

// newPuller subscribes to answers.
func (q *Queue) newPuller(pools []string) (*puller, error) {
	p := &puller{
		q: q, inbox: natsgo.InboxPrefix + nuid.Next(), msgs: make(chan *natsgo.Msg, 4*bands*max(len(pools), 1)),
		pending: map[int]int{}, heard: time.Now(),
	}
	for b := range bands {
		for _, pool := range pools {
			p.sources = append(p.sources, source{pool, b})
		}
	}
	sub, err := q.nc.Subscribe(p.inbox+".*", p.deliver)
	if err != nil {
		return nil, fmt.Errorf("subscribe to jobs: %w", q.classify(err))
	}
	p.sub = sub
	return p, nil
}

// deliver takes what the broker sends, in the subscription's goroutine.
func (p *puller) deliver(m *natsgo.Msg) {
	p.mu.Lock()
	taken := false
	if !p.closed {
		select {
		case p.msgs <- m:
			taken = true
		default:
		}
	}
	p.mu.Unlock()
	if !taken {
		p.handBack(m)
	}
}

// handBack returns a job that nobody has looked at.
func (p *puller) handBack(m *natsgo.Msg) {
	if isJob(m) {
		p.q.reject(m, 0)
	}
}

// close ends the requests that are under way, and hands back what they brought.
func (p *puller) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	// The broker drops requests that nobody listens for. What it sent before
	// it learns of that still comes to deliver.
	_ = p.sub.Drain() // fails where the connection is gone, and the requests with it
	for {
		select {
		case m := <-p.msgs:
			p.handBack(m)
		default:
			return
		}
	}
}

// isJob tells a job from the broker's remarks.
func isJob(m *natsgo.Msg) bool { return strings.HasPrefix(m.Reply, ackPrefix) }

const ackPrefix = "$JS.ACK."

// pullRequest is the body of a request for a message.
type pullRequest struct {
	Batch     int           `json:"batch"`
	NoWait    bool          `json:"no_wait,omitempty"`
	Expires   time.Duration `json:"expires,omitempty"`
	Heartbeat time.Duration `json:"idle_heartbeat,omitempty"`
}

// waitFor is how long a request waits at the broker before it is made anew, in
// heartbeats.
const waitFor = 12

// ask asks a source for one job.
func (p *puller) ask(ctx context.Context, i int, r pullRequest) error {
	src := p.sources[i]
	if err := p.q.ensureConsumer(ctx, src.pool, src.band); err != nil {
		return err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	p.last++
	subject := "$JS.API.CONSUMER.MSG.NEXT." + p.q.jobsStream() + "." + consumerName(src.pool, src.band)
	if err := p.q.nc.PublishRequest(subject, p.inbox+"."+strconv.Itoa(p.last), data); err != nil {
		return fmt.Errorf("ask for jobs of %s: %w", src.pool, p.q.classify(err))
	}
	p.pending[p.last] = i
	return nil
}

// The broker's remarks on a request, as it numbers them.
const (
	statusHeartbeat = "100"
	statusNone      = "404" // none is there, for a request that doesn't wait
	statusExpired   = "408"
	// Others: the consumer or its server is going away, or there is none.
)

// answer sorts a message of the broker's: a job, or the source whose request has
// ended. Broken says that the source did not want to serve it.
func (p *puller) answer(m *natsgo.Msg) (job *natsgo.Msg, ended int, broken bool) {
	p.heard = time.Now()
	if isJob(m) {
		// Which request brought it is not told.
		return m, -1, false
	}
	status := m.Header.Get("Status")
	n, err := strconv.Atoi(m.Subject[strings.LastIndexByte(m.Subject, '.')+1:])
	i, ok := p.pending[n]
	if err != nil || !ok || status == statusHeartbeat {
		return nil, -1, false
	}
	delete(p.pending, n)
	if status != statusNone && status != statusExpired {
		p.q.forgetConsumer(p.sources[i].pool, p.sources[i].band)
		return nil, i, true
	}
	return nil, i, false
}

// poll asks the sources one after the other for what is there.
func (p *puller) poll(ctx context.Context) (*natsgo.Msg, error) {
	timer := time.NewTimer(min(p.q.opts.Timeout, 2*p.q.opts.Heartbeat))
	defer timer.Stop()
	for i := range p.sources {
		if err := p.ask(ctx, i, pullRequest{Batch: 1, NoWait: true}); err != nil {
			return nil, err
		}
		for ended := -1; ended != i; {
			select {
			case m := <-p.msgs:
				var job *natsgo.Msg
				if job, ended, _ = p.answer(m); job != nil {
					return job, nil
				}
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-p.q.done:
				return nil, queue.ErrClosed
			case <-timer.C:
				return nil, nil //nolint:nilnil // a server may be gone; while waiting we see whether one comes
			}
		}
	}
	return nil, nil //nolint:nilnil // there is none
}

// reaskAfter is how long to leave a source alone that did not want to serve a
// request: a consumer is moving to another server.
const reaskAfter = 200 * time.Millisecond

// wait has all sources wait for a job, until one comes.
func (p *puller) wait(ctx context.Context) (*natsgo.Msg, error) {
	beat := p.q.opts.Heartbeat
	check := time.NewTicker(beat)
	defer check.Stop()
	var retry <-chan time.Time
	reconnected := p.q.reconnection()
	p.heard = time.Now()
	clear(p.pending)
	if err := p.askAll(ctx); err != nil {
		return nil, err
	}
	for {
		select {
		case m := <-p.msgs:
			job, ended, broken := p.answer(m)
			switch {
			case job != nil:
				return job, nil
			case broken && retry == nil:
				retry = time.After(reaskAfter)
			case ended >= 0 && !broken:
				if err := p.askAll(ctx); err != nil {
					return nil, err
				}
			}
			continue
		case <-retry:
			retry = nil
		case <-reconnected:
			reconnected = p.q.reconnection()
			clear(p.pending)
		case <-check.C:
			silent := time.Since(p.heard)
			if silent > 2*beat+p.q.opts.Timeout {
				return nil, fmt.Errorf("%w: nothing heard for %v", queue.ErrUnavailable, silent.Round(time.Millisecond))
			}
			if silent < 2*beat || !p.q.nc.IsConnected() {
				continue
			}
			clear(p.pending) // the broker has forgotten us
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-p.q.done:
			return nil, queue.ErrClosed
		}
		if err := p.askAll(ctx); err != nil {
			return nil, err
		}
	}
}

// askAll has those sources wait for a job that do not yet.
func (p *puller) askAll(ctx context.Context) error {
	waiting := make([]bool, len(p.sources))
	for _, i := range p.pending {
		waiting[i] = true
	}
	beat := p.q.opts.Heartbeat
	for i := range p.sources {
		if waiting[i] {
			continue
		}
		if err := p.ask(ctx, i, pullRequest{Batch: 1, Expires: waitFor * beat, Heartbeat: beat}); err != nil {
			return err
		}
	}
	return nil
}

// reconnection is closed with the next new connection.
func (q *Queue) reconnection() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.reconnected
}
