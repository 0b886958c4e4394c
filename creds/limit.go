package creds

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// limits are those of one identity; 0 is none.
type limits struct {
	perSecond  float64
	concurrent int
}

// limiter holds one identity to its limits.
type limiter struct {
	limits  limits
	rate    *rate.Limiter // nil: no limit
	running atomic.Int64
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

// of is the limiter of an identity that has limits.
func (ls *limiters) of(id *Identity) *limiter {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l := ls.byName[id.Name]
	if l == nil {
		if len(ls.byName) >= maxLimiters {
			for name, other := range ls.byName {
				if other.running.Load() == 0 {
					delete(ls.byName, name)
				}
			}
		}
		if ls.byName == nil {
			ls.byName = map[string]*limiter{}
		}
		l = &limiter{}
		ls.byName[id.Name] = l
	}
	if l.limits != id.limits {
		l.limits = id.limits
		l.rate = nil
		if r := id.limits.perSecond; r > 0 {
			l.rate = rate.NewLimiter(rate.Limit(r), max(1, int(r)))
		}
	}
	return l
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
	l := ls.of(id)
	if n := l.running.Add(1); id.limits.concurrent > 0 && n > int64(id.limits.concurrent) {
		l.running.Add(-1)
		return nil, &exceeded{"concurrent_calls", time.Second}
	}
	leave = func() { l.running.Add(-1) }
	ls.mu.Lock()
	r := l.rate
	ls.mu.Unlock()
	if r != nil && !r.Allow() {
		leave()
		return nil, &exceeded{"calls_per_second", time.Second}
	}
	return leave, nil
}
