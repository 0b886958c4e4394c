package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

// rounds is how many slices a measurement is cut into, with a floor before,
// between and after: three follow a drift within the measurement, and leave
// slices long enough to settle.
const rounds = 3

// onceTimeout bounds the ops of a scenario that has each client do one.
const onceTimeout = 10 * time.Minute

// errSkip is wrapped by what prepare returns where the server does not offer
// what is to be measured. That is no failure.
var errSkip = errors.New("skipped")

// A scenario is one line of the report.
type scenario struct {
	subject, name string
	clients       int
	unit          string  // of the value
	perOp         float64 // units in one op
	floor         floorKind
	floorPerOp    float64 // units of the floor that one op is compared with
	maxOps        uint64  // bounds what a measurement writes; 0: only its time does
	once          bool    // each client does one op, however long it takes
	// waits, where it is not nil, gets how long each op's job waited for a worker.
	waits *waits
	// flood, where it is not nil, is what goes on beside the op, which is prepareGood's
	// where prepare is nil.
	flood *flood
	// prepare puts what the op needs into the server. It is nil for the
	// subject floor, whose op is the floor's own.
	prepare func(context.Context, *client) (op, error)
	// prepareEach, in its place, also returns what puts into the server what one
	// op needs, whose time does not count.
	prepareEach func(context.Context, *client) (before, op op, err error)
}

// isFloor reports whether the scenario measures the machine alone.
func (s *scenario) isFloor() bool { return s.flood == nil && s.prepare == nil && s.prepareEach == nil }

// make is prepare or prepareEach.
func (s *scenario) make(ctx context.Context, c *client) (before, op op, err error) {
	if s.prepareEach != nil {
		return s.prepareEach(ctx, c)
	}
	op, err = s.prepare(ctx, c)
	return nil, op, err
}

// runner runs scenarios one after the other.
type runner struct {
	o      Options
	client *client
	floors *floors
	probe  probe
}

func (r *runner) run(ctx context.Context, plan []scenario) *Report {
	rep := newReport(r.o)
	for i, s := range plan {
		if ctx.Err() != nil {
			break
		}
		// Progress that cannot be written is no reason to stop.
		_, _ = fmt.Fprintf(r.o.Progress, "[%d/%d] %s %s, clients: %d\n", i+1, len(plan), s.subject, s.name, s.clients)
		rep.Results = append(rep.Results, r.measure(ctx, s))
	}
	rep.Interrupted = ctx.Err() != nil
	return rep
}

// measure runs one scenario.
func (r *runner) measure(ctx context.Context, s scenario) (res Result) {
	if s.flood != nil {
		return r.flooded(ctx, s)
	}
	res = Result{Subject: s.subject, Case: s.name, Clients: s.clients, Unit: s.unit}
	if err := r.floors.refuses(ctx, s.floor); err != nil {
		res.Skipped = err.Error()
		return res
	}
	if s.isFloor() {
		t := r.floor(ctx, s, r.o.Duration)
		res.fill(s, t)
		return res
	}
	var seq atomic.Uint64
	f, l, warm, err := r.warmUp(ctx, s, &seq)
	switch {
	case errors.Is(err, errSkip):
		res.Skipped = err.Error()
		return res
	case err != nil:
		if ctx.Err() == nil {
			res.Errors, res.FirstError = 1, err.Error()
		}
		return res
	}
	if s.waits != nil {
		s.waits.reset()
		defer func() { res.HandOffMS = s.waits.latency() }()
	}
	if r.client != nil {
		r.client.overheads.reset()
		defer func() { res.OverheadMS = r.client.overheads.latency() }()
	}
	var before sample
	total, floor := &tally{}, &tally{}
	var floorRates []float64
	parts := rounds
	l.duration, l.maxOps = r.o.Duration/rounds, share(s.maxOps, rounds)
	if s.once {
		parts, l.duration, l.maxOps = 1, onceTimeout, uint64(s.clients) //nolint:gosec // not negative
	}
	peak := r.probe.watch(ctx, s.once)
	for i := range parts {
		floorRates = append(floorRates, r.sampleFloor(ctx, s, floor))
		if i == 0 {
			// Some time after the warm-up, which a server may have to clean up after.
			if before, err = r.probe.sample(ctx); err != nil {
				res.Server = &ServerUsage{Error: err.Error()}
			}
		}
		total.merge(l.run(ctx, &seq, f))
		if ctx.Err() != nil || total.errors >= maxErrors {
			break
		}
	}
	highest := peak()
	if res.Server == nil {
		res.Server = r.probe.usage(ctx, before, total.lat.n)
	}
	if res.Server != nil {
		res.Server.PeakRSSBytes = highest
	}
	floorRates = append(floorRates, r.sampleFloor(ctx, s, floor))
	r.probe.recount(ctx, res.Server)
	total.errors += warm.errors
	if total.firstErr == nil {
		total.firstErr = warm.firstErr
	}
	res.fill(s, total)
	res.fillFloor(s, floor, floorRates)
	return res
}

// warmUp prepares the op of s and runs it for a while, so that connections,
// caches and the heap of the server are as they will be. It returns the op, and
// what it was run by.
func (r *runner) warmUp(ctx context.Context, s scenario, seq *atomic.Uint64) (op, load, *tally, error) {
	setup, cancel := context.WithTimeout(ctx, 2*callTimeout)
	defer cancel()
	before, f, err := s.make(setup, r.client)
	l := load{clients: s.clients, duration: min(r.o.Duration/4, time.Second), maxOps: share(s.maxOps, 16), before: before}
	if err != nil {
		return nil, l, nil, fmt.Errorf("prepare: %w", err)
	}
	if s.once {
		return f, l, &tally{}, nil
	}
	return f, l, l.run(ctx, seq, f), nil
}

// sampleFloor measures the floor of s once, adds it to total, and returns its rate.
func (r *runner) sampleFloor(ctx context.Context, s scenario, total *tally) float64 {
	t := r.floor(ctx, s, min(max(r.o.Duration/12, 20*time.Millisecond), time.Second))
	total.merge(t)
	return t.rate() * s.floor.perOp()
}

func (r *runner) floor(ctx context.Context, s scenario, d time.Duration) *tally {
	var seq atomic.Uint64
	l := load{clients: s.clients, duration: d}
	if s.once {
		l.clients = 1 // streams of a connection share what there is
	}
	return l.run(ctx, &seq, r.floors.op(s.floor))
}

// share divides a limit, keeping 0, no limit, and at least one.
func share(limit, parts uint64) uint64 {
	if limit == 0 {
		return 0
	}
	return max(limit/parts, 1)
}

// fill takes over what was measured.
func (res *Result) fill(s scenario, t *tally) {
	res.Ops, res.Errors = t.lat.n, t.errors
	if t.firstErr != nil {
		res.FirstError = t.firstErr.Error()
	}
	if t.lat.n == 0 {
		return
	}
	res.Seconds = t.elapsed.Seconds()
	res.Value = t.rate() * s.perOp
	res.LatencyMS = latencyOf(&t.lat)
	res.ClientCPUMS = ms(t.cpu) / float64(t.lat.n)
}

// fillFloor takes over the floor's samples, in the order in which they were made.
func (res *Result) fillFloor(s scenario, t *tally, rates []float64) {
	if t.lat.n == 0 {
		return
	}
	m := median(slices.Sorted(slices.Values(rates)))
	res.Floor = &FloorResult{
		Name: s.floor.String(), Unit: s.floor.unit(), Value: m, Samples: rates, LatencyMS: latencyOf(&t.lat),
	}
	if res.LatencyMS != nil && m > 0 {
		res.Share = res.Value / s.perOp * s.floorPerOp / m
		res.OverFloorP50MS = res.LatencyMS.P50 - res.Floor.LatencyMS.P50
	}
}
