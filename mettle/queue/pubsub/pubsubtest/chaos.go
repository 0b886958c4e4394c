package pubsubtest

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Chaos is how a server fails by chance. The zero Chaos is none. Shares are of
// calls, from 0 to 1; of what streams say, acknowledgements count as calls.
type Chaos struct {
	// Seed decides what happens to the first call, the second and so on. Which
	// call is the first is up to those who call.
	Seed uint64
	// Unavailable is the share of calls that are refused.
	Unavailable float64
	// LoseAnswers is the share of calls that are made and whose answers are lost.
	LoseAnswers float64
	// Twice is the share of calls that are made twice: what is published by
	// one is there twice then.
	Twice float64
	// Delay is the share of calls that are late, by up to MaxDelay, which is
	// 200 ms where it is 0.
	Delay    float64
	MaxDelay time.Duration
	// DropAcks is the share of acknowledgements that are answered and not made.
	DropAcks float64
	// Duplicate is the share of pulls whose messages go to somebody else as well.
	Duplicate float64
	// BurstEvery is how often all calls are refused for the time of Burst, and
	// CutEvery how often all streams are cut; 0: never.
	BurstEvery, Burst, CutEvery time.Duration
}

// Faults is what c does to each call, for SetFault: all but the bursts and cuts.
func (c Chaos) Faults() func(method string, req any) Fault {
	if c.MaxDelay <= 0 {
		c.MaxDelay = 200 * time.Millisecond
	}
	d := &dice{r: rand.New(rand.NewPCG(c.Seed, 1))} //nolint:gosec // chance
	return func(method string, _ any) Fault { return c.roll(d, method) }
}

// Fail has the server fail by c until ctx is done, and returns then. It takes
// the place of what SetFault has set.
func (s *Server) Fail(ctx context.Context, c Chaos) {
	calm := c.Faults()
	s.SetFault(calm)
	defer s.SetFault(nil)
	burst, cut := every(c.BurstEvery), every(c.CutEvery)
	defer burst.Stop()
	defer cut.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-cut.C:
			s.CutStreams()
		case <-burst.C:
			s.SetFault(func(string, any) Fault { return Fault{Before: status.Error(codes.Unavailable, "a burst of failures")} })
			s.CutStreams()
			sleep(ctx, c.Burst)
			s.SetFault(calm)
		}
	}
}

// every is a ticker, or one that never ticks.
func every(d time.Duration) *time.Ticker {
	if d > 0 {
		return time.NewTicker(d)
	}
	t := time.NewTicker(time.Hour)
	t.Stop()
	return t
}

// dice is a source of chance for many.
type dice struct {
	mu sync.Mutex
	r  *rand.Rand
}

// roll draws a number for each share: so what one of them is does not change
// what comes of the others.
func (c Chaos) roll(d *dice, method string) Fault {
	d.mu.Lock()
	defer d.mu.Unlock()
	hit := func(share float64) bool { return d.r.Float64() < share }
	var f Fault
	if hit(c.Unavailable) {
		f.Before = status.Error(codes.Unavailable, "not now")
	}
	if hit(c.LoseAnswers) {
		f.After = Lost()
	}
	f.Twice = hit(c.Twice)
	if late := d.r.Int64N(int64(c.MaxDelay)); hit(c.Delay) {
		f.Delay = time.Duration(late)
	}
	f.Drop = hit(c.DropAcks) && method == "Acknowledge"
	f.Duplicate = hit(c.Duplicate) && method == "Pull"
	return f
}
