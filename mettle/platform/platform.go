// Package platform turns the platform properties of an action into the name of
// the pool whose workers may run it, or into a refusal that names the property,
// says what would be accepted, and which pool comes nearest. Nothing waits in a
// queue that nobody serves.
//
// The properties are those of the REAPI's lexicon (platform.md, in its
// repository): OSFamily takes one value, in any case; ISA may be given several
// times, and a worker must have them all; likewise any property that is declared.
// container-image is refused unless it is empty or "none", or declared: workers
// run on their own system. Names, and the values of all properties but OSFamily,
// are compared exactly.
//
// Of the pools that have all that is asked for, the one with the fewest
// properties beside it is taken, so that what is special stays free for those who
// need it; among equals the default pool, then the first by name. An action that
// asks for nothing goes to the default pool, if there is one.
//
// Which pools there are, a Set hears from two sides. The operator declares pools,
// which are there for good, with workers or without: jobs wait for a fleet that
// is scaled from zero. And workers tell of themselves (queue.Notifier): a pool
// that nobody declared is there from its first worker on until a while (Linger)
// after its last, so that jobs wait while workers are restarted. It has the
// properties that all its workers declare.
//
// What a Set has not heard it does not know. While it can't hear, and until it
// has listened for as long as every worker needs to tell of itself, it forgets no
// pool, and Unsettled says that an action that fits none should wait.
//
// It does no I/O, has no goroutine, and looks at the clock when it is asked.
// mettle/api, its caller, tells it the notices, and decides whether the Action's
// or the Command's platform counts.
package platform

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/mettle/queue"
)

// The classes of errors.
var (
	// ErrUnsupported is wrapped by the errors of Match.
	ErrUnsupported = errors.New("unsupported platform")
	// ErrImpossible wraps ErrUnsupported: no pool could ever have what was asked for.
	ErrImpossible = fmt.Errorf("%w that there can't be", ErrUnsupported)
	// errNonsense: what a worker or an operator declares can't be.
	errNonsense = errors.New("nonsense")
)

// Options are the settings of a Set.
type Options struct {
	// Pools are those that are there for good. Default, unless FromWorkers: one,
	// queue.DefaultPool, of workers like this machine: see Host.
	Pools []Pool
	// Properties are added to all of Pools: what the operator declares.
	Properties []Property
	// FromWorkers says that there are as many pools more as workers tell of. The
	// caller tells Observe and Heard what it hears.
	FromWorkers bool
	// Linger is how long a pool that was not declared stays after its last
	// worker. Default 5 min.
	Linger time.Duration
	// Settle is how long a Set must have heard to know all that is there: a bit
	// more than a worker takes to tell of itself again. Default 25 s.
	Settle time.Duration
	// Logger is told of workers that differ from others of their pool, and of
	// nonsense. Default: none.
	Logger *slog.Logger
}

// The bounds of what a Set takes from workers. Past them it takes no more: the
// first are served.
const (
	maxPools   = 256
	maxWorkers = 1 << 16
	maxSlots   = 1 << 12 // of one worker
)

// deafAfter is how long after the last notice a Set takes itself for deaf. The
// API server has itself told something more often than that.
const deafAfter = 20 * time.Second

func (o Options) withDefaults() Options {
	if len(o.Pools) == 0 && !o.FromWorkers {
		o.Pools = []Pool{{Name: queue.DefaultPool, Properties: Host()}}
	}
	if o.Linger == 0 {
		o.Linger = 5 * time.Minute
	}
	if o.Settle == 0 {
		o.Settle = 25 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// Set knows the pools. It is safe for concurrent use.
type Set struct {
	o Options
	// view is what Match reads, so that it need not wait for who writes.
	view atomic.Pointer[view]

	mu      sync.Mutex // guards the rest
	pools   map[string]*pool
	workers map[workerKey]*worker
	// heard is when the last notice came, and hearing since when there was no
	// time of deafness.
	heard, hearing time.Time
	changed        chan struct{} // closed when there is another view, or it can hear again
	refused        int           // how many notices made no sense
}

// view is the pools as they are offered, until due. It is immutable.
type view struct {
	offers []offer
	due    time.Time // when something may be over; zero: never
}

// New checks the options and makes a Set.
func New(o Options) (*Set, error) {
	o = o.withDefaults()
	if o.Linger < 0 || o.Settle < 0 {
		return nil, errors.New("platform: a negative time")
	}
	s := &Set{o: o, pools: make(map[string]*pool), workers: make(map[workerKey]*worker), changed: make(chan struct{})}
	for _, in := range o.Pools {
		if err := checkName(in.Name); err != nil {
			return nil, fmt.Errorf("platform: pool: %w", err)
		}
		if s.pools[in.Name] != nil {
			return nil, fmt.Errorf("platform: there are two pools %q", in.Name)
		}
		props := slices.Concat(in.Properties, o.Properties)
		if err := checkProperties(props); err != nil {
			return nil, fmt.Errorf("platform: pool %q: %w", in.Name, err)
		}
		p := newPool(in.Name)
		p.declared, p.declares, p.slots = true, sorted(props), float64(max(in.Slots, 1))
		s.pools[in.Name] = p
	}
	s.show(time.Now())
	return s, nil
}

// Names lists the names of the pools, the default one first.
func (s *Set) Names() []string {
	offers := s.offers(time.Now())
	names := make([]string, len(offers))
	for i, o := range offers {
		names[i] = o.name
	}
	return names
}

// Match finds the pool for an action that asks for the given properties, which
// may be nil. The error wraps ErrUnsupported and names a property that cannot be
// had. It waits for nothing: see Unsettled.
func (s *Set) Match(want *repb.Platform) (string, error) {
	offers := s.offers(time.Now())
	props := demands(want)
	if len(props) == 0 && len(offers) > 0 && offers[0].name == queue.DefaultPool {
		return queue.DefaultPool, nil
	}
	if err := check(props); err != nil {
		return "", err
	}
	if o := choose(offers, props); o != nil {
		return o.name, nil
	}
	return "", refuse(offers, props)
}

// offers are the pools that there are now, the default one first, then by name.
func (s *Set) offers(now time.Time) []offer {
	v := s.view.Load()
	if v.due.IsZero() || now.Before(v.due) {
		return v.offers
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire(now)
	return s.view.Load().offers
}

// show makes the view of what there is. The mutex is held, or nobody else has s.
func (s *Set) show(now time.Time) {
	v := &view{offers: make([]offer, 0, len(s.pools)), due: s.due(now)}
	for _, p := range s.pools {
		v.offers = append(v.offers, offer{name: p.name, props: p.props()})
	}
	slices.SortFunc(v.offers, func(a, b offer) int {
		switch queue.DefaultPool {
		case a.name:
			return -1
		case b.name:
			return 1
		}
		return strings.Compare(a.name, b.name)
	})
	s.view.Store(v)
	s.wake()
}

// wake wakes those who wait for a change. The mutex is held.
func (s *Set) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Heard says that a notice has come, whatever it is about: so the Set would hear
// of workers too, if there were any.
func (s *Set) Heard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hear(time.Now())
}

// hear is Heard with the mutex held.
func (s *Set) hear(now time.Time) {
	if s.deaf(now) {
		s.hearing = now
		s.wake()
	}
	s.heard = now
}

func (s *Set) deaf(now time.Time) bool {
	return s.heard.IsZero() || now.Sub(s.heard) >= deafAfter
}

// settled reports whether s has heard for long enough. The mutex is held.
func (s *Set) settled(now time.Time) bool {
	return !s.o.FromWorkers || !s.deaf(now) && now.Sub(s.hearing) >= s.o.Settle
}

// Unsettled tells whether the Set may not know all pools yet, so that an action
// that Match has refused should wait, and then ask again: until changed is
// closed, or for the time left. It is to be called before Match.
func (s *Set) Unsettled() (changed <-chan struct{}, left time.Duration, unsettled bool) {
	if !s.o.FromWorkers {
		return nil, 0, false
	}
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.settled(now):
		return nil, 0, false
	case s.deaf(now):
		return s.changed, deafAfter, true // whoever hears again wakes those who wait
	}
	return s.changed, s.hearing.Add(s.o.Settle).Sub(now), true
}
