//go:build linux

package sim_test

import (
	"fmt"
	"time"
)

// schedule has everything go wrong that the plan says, each thing in a goroutine
// of its own, and all be well at the horizon.
func (w *world) schedule() {
	p := w.plan
	for _, f := range []struct {
		kind faults
		make func(key string)
	}{
		{crashAPI, w.crashSome(len(w.apis), func(i int) node { return w.apis[i] })},
		{crashWorker, w.crashSome(len(w.workers), func(i int) node { return w.workers[i] })},
		{restarts, w.restartSome},
		{sickness, w.sickenSome},
		{partitions, w.cutSome},
		{storeAway, w.outage(&w.storage.service)},
		{brokerAway, w.outage(&w.broker.service)},
	} {
		if !p.faults.has(f.kind) {
			continue
		}
		for i := range 1 + w.dice.among(f.kind.String(), 4) {
			f.make(fmt.Sprint(f.kind, i))
		}
	}
	// All API servers at once: nobody remembers anything.
	if p.faults.has(crashAPI) && w.dice.chance("blackout", 0.3) {
		t := w.moment("blackout")
		for i, a := range w.apis {
			w.at(t+time.Duration(i), func() { w.bounce(a, a.crash, "blackout "+a.node) })
		}
	}
}

// moment is a time before the horizon.
func (w *world) moment(key string) time.Duration { return w.dice.between(key, 0, w.plan.horizon) }

// span is how long something lasts: mostly less than a lease, sometimes longer,
// and not past the horizon.
func (w *world) span(key string, from time.Duration) time.Duration {
	d := w.dice.between(key, 100*time.Millisecond, 15*time.Second)
	if w.dice.chance(key, 0.4) {
		d = w.dice.between(key, 15*time.Second, 2*time.Minute)
	}
	return max(min(d, w.plan.horizon-from), time.Millisecond)
}

func (w *world) crashSome(n int, of func(int) node) func(string) {
	return func(key string) {
		k := of(w.dice.among(key, n))
		w.at(w.moment(key), func() { w.bounce(k, k.crash, key) })
	}
}

func (w *world) restartSome(key string) {
	all := w.nodes()
	k := all[w.dice.among(key, len(all))]
	w.at(w.moment(key), func() { w.bounce(k, k.end, key) })
}

// bounce ends a process, and starts the next one after a while.
func (w *world) bounce(k node, end func(), key string) {
	w.crashed()
	end()
	time.Sleep(w.span(key, w.now()))
	w.excuse(k.name(), "a restart")
	if err := k.start(); err != nil {
		w.violate("%s does not start: %v", k.name(), err)
	}
}

// sickenSome has a worker fail all that it runs.
func (w *world) sickenSome(key string) {
	n := w.workers[w.dice.among(key, len(w.workers))]
	t := w.moment(key)
	w.at(t, func() {
		span := w.span(key, t)
		w.trace(n.node, "is sick for %v", span)
		w.excuseFor(n.node, span, "sickness")
		n.sick.Add(1)
		time.Sleep(span)
		n.sick.Add(-1)
	})
}

// cutSome cuts a node off from the broker, or the store, or both.
func (w *world) cutSome(key string) {
	all := w.nodes()
	name := all[w.dice.among(key, len(all))].name()
	which := w.dice.among(key+" from", 3)
	t := w.moment(key)
	w.at(t, func() {
		span := w.span(key, t)
		var cuts []cut
		if which != 0 {
			cuts = append(cuts, cut{name, w.broker.name})
		}
		if which != 1 {
			cuts = append(cuts, cut{name, w.storage.name})
		}
		w.trace("network", "%v for %v", cuts, span)
		w.excuseFor(name, span, "a cut")
		w.setCuts(cuts, 1)
		time.Sleep(span)
		w.setCuts(cuts, -1)
	})
}

func (w *world) setCuts(cuts []cut, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range cuts {
		w.cuts[c] += n
	}
}

// outage makes a service refuse, or answer slowly, for a while.
func (w *world) outage(s *service) func(string) {
	return func(key string) {
		t := w.moment(key)
		slow := w.dice.chance(key+" slow", 0.5)
		w.at(t, func() {
			span := w.span(key, t)
			w.trace(s.name, "away for %v, slow: %v", span, slow)
			w.excuseFor("*", span, s.name+" is away")
			w.setAway(s, slow, true)
			time.Sleep(span)
			w.setAway(s, slow, false)
			w.broker.mu.Lock()
			w.broker.match()
			w.broker.mu.Unlock()
		})
	}
}

func (w *world) setAway(s *service, slow, away bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if slow {
		s.slow = away
	} else {
		s.down = away
	}
}

// breakLater has a client's connection break after a while, if the plan has that.
func (w *world) breakLater(s *stream, who string) {
	key := "break " + who
	if !w.plan.faults.has(brokenConns) || !w.unsettled() || !w.dice.chance(key, 0.4) {
		return
	}
	after := w.dice.between(key, 0, 10*time.Second)
	if w.dice.chance(key, 0.5) {
		after = w.dice.between(key, 0, time.Minute)
	}
	// Each side learns at once, or when its keepalive fails.
	var learns [2]time.Duration
	for i := range learns {
		if w.dice.chance(key, 0.3) {
			learns[i] = w.dice.between(key, 0, 30*time.Second)
		}
	}
	time.AfterFunc(after, func() {
		if s.ctx.Err() != nil {
			return // it is over
		}
		w.excuseFor(who, learns[0], "a broken connection")
		s.lose()
		time.AfterFunc(learns[0], func() { s.fail("the connection is broken") })
		time.AfterFunc(learns[1], s.cut)
	})
}
