package gate

import (
	"math"
	"runtime"
	rtmetrics "runtime/metrics"
	"time"
)

const (
	// weighEvery is how often the memory is looked at while there are calls. What
	// comes in meanwhile is what the limit is overshot by: a fast machine's loopback
	// brings 100 MB in that time.
	weighEvery = 50 * time.Millisecond
	// shortPart and easedPart are the parts of the limit, in percent, from which on
	// what is alive is too much, and below which it is not any more.
	shortPart, easedPart = 75, 60
	// collectPart is the part of the limit at which it is looked what is alive.
	collectPart = 90
	// collectEvery is how often that is done at most: time for calls that were ended
	// to give up what they have. Below collectPart it is a third of the time at most while
	// memory is short, and a tenth before, lest a large heap, of an index for instance, have
	// the CPUs do nothing else.
	collectEvery = 200 * time.Millisecond
	tightPause   = 3
	pausePart    = 10
	// minShare is how many calls each connection may have, however short memory is.
	minShare = 16
	// unlimited is the share while memory is not short, and was not lately; it is
	// back there when it has grown to maxShare, by an eighth each second.
	unlimited = math.MaxInt64
	maxShare  = 16_384
	// minStuck is how much a connection has on its way that is closed for it where
	// memory is short, and stuckTicks for how long none of it was taken.
	minStuck   = 4 << 20
	stuckTicks = 5
	// minCut is how many calls of a client are not ended for the memory they take:
	// with as many it can't be theirs.
	minCut = 4
)

// memory tells what is in use on the heap.
type memory struct {
	samples   []rtmetrics.Sample
	collected time.Time
	took      time.Duration // the last collection
	tight     bool          // it was too much, and is not eased yet
}

func newMemory() *memory {
	return &memory{samples: []rtmetrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/objects:bytes"}}}
}

// read is what was alive when the garbage was last collected, and what is in use
// now, with the garbage.
func (m *memory) read() (live, used int64) {
	rtmetrics.Read(m.samples)
	return int64(m.samples[0].Value.Uint64()), int64(m.samples[1].Value.Uint64()) //nolint:gosec // sizes of memory
}

// weigh is what is alive, and whether that is so now, for which it has the garbage
// collected where it may be too much; otherwise it is what was alive then.
func (m *memory) weigh(limit int64) (live int64, fresh bool) {
	live, used := m.read()
	if live < limit/100*easedPart {
		m.tight = false
	}
	pause := collectEvery
	switch {
	case used >= limit/100*collectPart:
	case m.tight:
		pause = max(pause, tightPause*m.took)
	case live >= limit/100*easedPart && used >= limit/100*shortPart:
		pause = max(pause, pausePart*m.took)
	default:
		return live, false
	}
	if time.Since(m.collected) < pause {
		return live, false
	}
	from := time.Now()
	runtime.GC()
	m.collected = time.Now()
	m.took = m.collected.Sub(from)
	live, _ = m.read()
	m.tight = m.tight && live >= limit/100*easedPart || live >= limit/100*shortPart
	return live, true
}

// relieve ends calls where what is alive is too much: of the client that has the
// most of them waiting, the younger half. The next look shows whether that
// was enough.
func (g *Gate) relieve() {
	limit := g.o.MaxMemoryBytes
	live, fresh := g.weigh(limit)
	switch {
	case live >= limit/100*shortPart && fresh:
		g.shorten(live)
	case live < limit/100*easedPart && g.short.Swap(false):
		g.log.Info("memory is not short any more", "heap_bytes", live)
	}
}

// shorten has memory be short, and ends calls.
func (g *Gate) shorten(live int64) {
	cut, left := g.heaviest(waits)
	if cut == nil && !g.shutHeaviest() {
		// Nobody hoards messages: it is the number of calls.
		cut, left = g.heaviest(func(*call) bool { return true })
	}
	g.share.Store(max(minShare, min(g.share.Load(), int64(left))))
	if !g.short.Swap(true) {
		g.log.Warn("memory is short: new calls of those who have many are turned away, and calls that wait for their clients are ended", "heap_bytes", live, "limit_bytes", g.o.MaxMemoryBytes)
	}
	for _, c := range cut {
		c.cancel(memoryError{})
	}
	g.metrics.ended.Add(float64(len(cut)))
}

// regain lets connections have more calls again, little by little, since those that
// were turned away come back all at once. It is called each tick.
func (g *Gate) regain() {
	share := g.share.Load()
	if g.short.Load() || share == unlimited {
		return
	}
	if share += max(1, share/8); share >= maxShare {
		share = unlimited
	}
	g.share.Store(share)
}

// shutHeaviest closes the connection that has the most on its way to a client who
// has taken nothing for a while, if there is one.
func (g *Gate) shutHeaviest() bool {
	var heaviest *conn
	most, limit := int64(minStuck), g.ticks.Load()-stuckTicks
	for _, c := range g.connections() {
		if bytes, since := c.unsent.stuck(); bytes > most && since <= limit && c.close != nil {
			heaviest, most = c, bytes
		}
	}
	if heaviest == nil {
		return false
	}
	heaviest.shut(g.metrics.heavy)
	return true
}

// heaviest are the younger half of the calls of a kind of the client that has the
// most of them, if those are more than a few, and how many are left of those of the
// connection with the most. Of a client with several connections, as a proxy is, it
// is those with the most that lose some.
func (g *Gate) heaviest(kind func(*call) bool) (cut []*call, left int) {
	size := map[*client]int{}
	byClient := map[*client][][]*call{}
	for _, cn := range g.connections() {
		if calls := cn.youngest(kind); len(calls) > 0 {
			size[cn.client] += len(calls)
			byClient[cn.client] = append(byClient[cn.client], calls)
		}
	}
	var most *client
	for c, n := range size {
		if most == nil || n > size[most] {
			most = c
		}
	}
	if size[most] <= minCut {
		return nil, size[most]
	}
	largest := 0
	for _, calls := range byClient[most] {
		largest = max(largest, len(calls))
	}
	for _, calls := range byClient[most] {
		if 2*len(calls) >= largest {
			cut = append(cut, calls[:(len(calls)+1)/2]...)
		}
	}
	return cut[:min(len(cut), size[most]-minCut)], largest - (largest+1)/2
}
