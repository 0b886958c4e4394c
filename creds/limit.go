package creds

import (
	"maps"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// limits are those of one identity; 0 is none.
type limits struct {
	perSecond  float64
	concurrent int
}

// and is what holds where both do: the lower of each.
func (l limits) and(other limits) limits {
	if l.perSecond == 0 || other.perSecond > 0 && other.perSecond < l.perSecond {
		l.perSecond = other.perSecond
	}
	if l.concurrent == 0 || other.concurrent > 0 && other.concurrent < l.concurrent {
		l.concurrent = other.concurrent
	}
	return l
}

// limiter holds one identity to its limits.
type limiter struct {
	rate    *rate.Limiter // nil: none has been asked for
	running int
}

// limiters are those of all identities that call, by name: a subject with several
// tokens, and one whose policy was read again, is the same.
type limiters struct {
	mu     sync.Mutex
	byName map[string]*limiter
}

// maxLimiters bounds the identities that are remembered. Beyond it those are
// forgotten that have no call running.
const maxLimiters = 10_000

// of is the limiter of an identity that has limits. The caller holds mu.
func (ls *limiters) of(id *Identity) *limiter {
	l := ls.byName[id.Name]
	if l == nil {
		if len(ls.byName) >= maxLimiters {
			maps.DeleteFunc(ls.byName, func(_ string, other *limiter) bool { return other.running == 0 })
		}
		if ls.byName == nil {
			ls.byName = map[string]*limiter{}
		}
		l = &limiter{}
		ls.byName[id.Name] = l
	}
	l.allow(id.limits.perSecond)
	return l
}

// allow sets how many calls there may be in a second; 0 is no limit. What was used up
// stays so: one caller may come by turns with tokens that have different limits.
func (l *limiter) allow(perSecond float64) {
	r, burst := rate.Limit(perSecond), max(1, int(perSecond))
	switch {
	case perSecond == 0:
	case l.rate == nil:
		l.rate = rate.NewLimiter(r, burst)
	case l.rate.Limit() != r:
		l.rate.SetLimit(r)
		l.rate.SetBurst(burst)
	}
}

// exceeded is a limit that a call runs into.
type exceeded struct {
	what  string
	after time.Duration // when to try again
}

// enter begins a call, unless that is over a limit.
func (ls *limiters) enter(id *Identity) (leave func(), over *exceeded) {
	if id.limits == (limits{}) {
		return func() {}, nil
	}
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l := ls.of(id)
	switch {
	case id.limits.concurrent > 0 && l.running >= id.limits.concurrent:
		return nil, &exceeded{"concurrent_calls", time.Second}
	case id.limits.perSecond > 0 && !l.rate.Allow():
		return nil, &exceeded{"calls_per_second", time.Second}
	}
	l.running++
	return func() {
		ls.mu.Lock()
		defer ls.mu.Unlock()
		l.running--
	}, nil
}
