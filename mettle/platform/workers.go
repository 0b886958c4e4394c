package platform

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A pool is what is known of one. Its fields are guarded by Set.mu.
type pool struct {
	name     string
	declared bool
	declares []Property // what the operator says, whatever workers say
	// kinds are the different sets of properties that its workers have, by their
	// text: one, as a rule.
	kinds map[string]*kind
	// common is what all workers have or, where there are none, had.
	common  []Property
	workers int
	empty   time.Time // when the last worker went that has gone
	// slots is how many a worker has, on average, or had.
	slots float64
}

// A kind is one set of properties, and how many workers have it.
type kind struct {
	props    []Property
	offering int // workers that will take another job
	compared bool
}

// maxKinds bounds pool.kinds.
const maxKinds = 64

type workerKey struct{ pool, name string }

// A worker is the last that was heard of one. It is guarded by Set.mu.
type worker struct {
	kind           *kind
	state          queuepb.WorkerState_State
	slots, running int32
	until          time.Time // when it is taken for gone
}

// offers says that the worker takes jobs, or will again.
func (w *worker) offers() bool { return w.state != queuepb.WorkerState_DRAINING }

func newPool(name string) *pool {
	return &pool{name: name, kinds: make(map[string]*kind), slots: 1}
}

// props is what the pool offers.
func (p *pool) props() []Property {
	return sorted(slices.Concat(p.declares, p.common))
}

// The bounds of a WorkerState's lifetime, and the default.
const (
	minLifetime     = time.Second
	maxLifetime     = 10 * time.Minute
	defaultLifetime = 45 * time.Second
)

// Observe takes in what a worker says of itself. What makes no sense, or is more
// than a Set can hold, changes nothing.
func (s *Set) Observe(state *queuepb.WorkerState) {
	if !s.o.FromWorkers && !s.known(state.GetPool()) {
		return
	}
	props := make([]Property, 0, len(state.GetProperties()))
	for _, p := range state.GetProperties() {
		props = append(props, Property{p.GetName(), p.GetValue()})
	}
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hear(now)
	if err := s.observe(now, state, sorted(props)); err != nil {
		s.refused++
		if s.refused&(s.refused-1) == 0 { // the first, the second, the fourth ...
			s.o.Logger.Warn("what a worker says of itself is ignored", "error", err, "worker", fmt.Sprintf("%.100s", state.GetWorker()),
				"pool", fmt.Sprintf("%.100s", state.GetPool()), "ignored_so_far", s.refused)
		}
	}
}

// known reports whether there is a pool of that name.
func (s *Set) known(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pools[name] != nil
}

// observe is Observe with the mutex held.
func (s *Set) observe(now time.Time, state *queuepb.WorkerState, props []Property) error {
	key := workerKey{pool: state.GetPool(), name: state.GetWorker()}
	w := s.workers[key]
	if state.GetState() == queuepb.WorkerState_GONE {
		if w != nil && s.remove(now, key, w) {
			s.show(now)
		}
		return nil
	}
	if state.GetState() == queuepb.WorkerState_STATE_UNSPECIFIED {
		return fmt.Errorf("%w: it has no state", errNonsense)
	}
	if err := s.admit(key, w, props); err != nil {
		return err
	}
	p := s.pools[key.pool]
	created := p == nil
	if created {
		p = newPool(key.pool)
		s.pools[key.pool] = p
	}
	text := textOf(props)
	k := p.kinds[text]
	if k == nil {
		if len(p.kinds) >= maxKinds { // and so it has workers
			return fmt.Errorf("%w: its pool has workers of %d different kinds already", errNonsense, len(p.kinds))
		}
		k = &kind{props: props}
		p.kinds[text] = k
	}
	if w == nil {
		w = &worker{}
		s.workers[key] = w
		p.workers++
	}
	p.move(w, k, state.GetState())
	w.slots, w.running = clamp(state.GetSlots()), clamp(state.GetRunning())
	lifetime := defaultLifetime
	if l := state.GetLifetime(); l != nil {
		lifetime = min(max(l.AsDuration(), minLifetime), maxLifetime)
	}
	w.until = now.Add(lifetime)
	if w.offers() {
		s.compare(key, k)
	}
	if p.agree() || created {
		s.show(now)
	} else {
		s.expect(w.until)
	}
	return nil
}

// admit checks what is new in a worker's words.
func (s *Set) admit(key workerKey, w *worker, props []Property) error {
	if w != nil {
		return checkProperties(props)
	}
	if err := checkName(key.name); err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	if err := checkName(key.pool); err != nil {
		return fmt.Errorf("pool: %w", err)
	}
	switch {
	case len(s.workers) >= maxWorkers:
		return fmt.Errorf("%w: there are %d workers already", errNonsense, len(s.workers))
	case s.pools[key.pool] == nil && len(s.pools) >= maxPools:
		return fmt.Errorf("%w: there are %d pools already", errNonsense, len(s.pools))
	}
	return checkProperties(props)
}

func clamp(n int32) int32 { return min(max(n, 0), maxSlots) }

// textOf makes of properties a key.
func textOf(props []Property) string {
	var b strings.Builder
	for _, p := range props {
		b.WriteString(p.Name)
		b.WriteByte(0)
		b.WriteString(p.Value)
		b.WriteByte(0)
	}
	return b.String()
}

// move makes w one of kind k in a state.
func (p *pool) move(w *worker, k *kind, state queuepb.WorkerState_State) {
	if w.kind != nil && w.offers() {
		w.kind.offering--
	}
	w.kind, w.state = k, state
	if w.offers() {
		k.offering++
	}
	p.prune()
}

// prune forgets the kinds that no worker offers.
func (p *pool) prune() {
	maps.DeleteFunc(p.kinds, func(_ string, k *kind) bool { return k.offering == 0 })
}

// agree finds what all workers of the pool have, and reports whether that has
// changed. Where there are none that take jobs, it stays what it was.
func (p *pool) agree() bool {
	var common []Property
	first := true
	for _, k := range p.kinds {
		if first {
			common, first = k.props, false
			continue
		}
		common = slices.DeleteFunc(slices.Clone(common), func(prop Property) bool { return !slices.Contains(k.props, prop) })
	}
	if first || slices.Equal(common, p.common) {
		return false
	}
	p.common = common
	return true
}

// compare tells, once a kind, how a worker differs from the others of its pool:
// what not all have is not offered.
func (s *Set) compare(key workerKey, k *kind) {
	if k.compared {
		return
	}
	k.compared = true
	p := s.pools[key.pool]
	var lacks, alone []Property
	for _, o := range p.kinds {
		if o != k {
			lacks, alone = append(lacks, without(o.props, k.props)...), append(alone, without(k.props, o.props)...)
		}
	}
	lacks = append(lacks, without(p.declares, k.props)...)
	if len(lacks)+len(alone) > 0 {
		s.o.Logger.Warn("a worker differs from others of its pool, or from what is declared for it",
			"worker", key.name, "pool", key.pool, "lacks", propertyTexts(sorted(lacks)), "has_alone", propertyTexts(sorted(alone)))
	}
}

// without is what of a is not in b.
func without(a, b []Property) []Property {
	return slices.DeleteFunc(slices.Clone(a), func(p Property) bool { return slices.Contains(b, p) })
}

func propertyTexts(props []Property) string {
	out := make([]string, len(props))
	for i, p := range props {
		out[i] = p.String()
	}
	return list(out)
}

// remove makes w one that is gone since a time, and reports whether its pool
// offers something else from now on. The mutex is held.
func (s *Set) remove(since time.Time, key workerKey, w *worker) bool {
	p := s.pools[key.pool]
	delete(s.workers, key)
	if w.offers() {
		w.kind.offering--
	}
	p.prune()
	if since.After(p.empty) {
		p.empty = since
	}
	if p.workers--; p.workers == 0 {
		s.expect(p.empty.Add(s.o.Linger))
	}
	return p.agree()
}

// expire removes the workers that have not been heard of for their lifetime, and
// the pools that have been without for long enough. The mutex is held.
func (s *Set) expire(now time.Time) {
	changed := false
	for key, w := range s.workers {
		if !now.Before(w.until) {
			changed = s.remove(w.until, key, w) || changed
		}
	}
	for name, p := range s.pools {
		if p.mayGo() && s.settled(now) && !now.Before(p.empty.Add(s.o.Linger)) {
			delete(s.pools, name)
			changed = true
		}
	}
	if changed {
		s.show(now)
		return
	}
	s.view.Store(&view{offers: s.view.Load().offers, due: s.due(now)})
}

// mayGo reports whether the pool goes once it has lingered.
func (p *pool) mayGo() bool { return p.workers == 0 && !p.declared }

// expect has expire called at t, or before. The mutex is held.
func (s *Set) expect(t time.Time) {
	if v := s.view.Load(); v.due.IsZero() || t.Before(v.due) {
		s.view.Store(&view{offers: v.offers, due: t})
	}
}

// unsettledPoll is how often a Set that can't hear looks whether it can forget.
const unsettledPoll = time.Second

// due is when something may be over: zero is never. The mutex is held.
func (s *Set) due(now time.Time) time.Time {
	var due time.Time
	earliest := func(t time.Time) {
		if due.IsZero() || t.Before(due) {
			due = t
		}
	}
	for _, w := range s.workers {
		earliest(w.until)
	}
	for _, p := range s.pools {
		if p.mayGo() {
			t := p.empty.Add(s.o.Linger)
			if !now.Before(t) { // it would be gone, but for
				t = now.Add(unsettledPoll)
			}
			earliest(t)
		}
	}
	return due
}
