package platform

import (
	"slices"
	"time"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Figures are what is known of a pool at one time.
type Figures struct {
	Name string
	// Declared says that the operator declared it, so that it never goes.
	Declared bool
	// Properties are what it offers, sorted.
	Properties []Property
	// Taking, Paused and Draining count its workers.
	Taking, Paused, Draining int
	// Slots is how many actions its workers can run at once, Running how many they
	// run, and Idle how many more the workers that take jobs could.
	Slots, Running, Idle int
	// SlotsPerWorker is the mean of a worker's slots; without workers, what it was,
	// or what was declared. It is above 0.
	SlotsPerWorker float64
}

// Figures lists the pools with what is known of them, in the order of Names. The
// caller owns them.
func (s *Set) Figures() []Figures {
	offers := s.offers(time.Now())
	s.mu.Lock()
	defer s.mu.Unlock()
	byPool := make(map[string]*Figures, len(offers))
	for _, o := range offers {
		if p := s.pools[o.name]; p != nil {
			byPool[o.name] = &Figures{Name: o.name, Declared: p.declared, Properties: slices.Clone(o.props)}
		}
	}
	for key, w := range s.workers {
		if f := byPool[key.pool]; f != nil {
			f.add(w)
		}
	}
	out := make([]Figures, 0, len(byPool))
	for _, o := range offers {
		f := byPool[o.name]
		if f == nil {
			continue
		}
		p := s.pools[o.name]
		if p.workers > 0 && f.Slots > 0 {
			p.slots = float64(f.Slots) / float64(p.workers)
		}
		f.SlotsPerWorker = p.slots
		out = append(out, *f)
	}
	return out
}

// add counts a worker.
func (f *Figures) add(w *worker) {
	f.Slots += int(w.slots)
	f.Running += int(w.running)
	switch w.state { //nolint:exhaustive // the others are of workers that are not there, or of a version to come
	case queuepb.WorkerState_TAKING:
		f.Taking++
		f.Idle += int(max(w.slots-w.running, 0))
	case queuepb.WorkerState_DRAINING:
		f.Draining++
	default:
		f.Paused++
	}
}
