package file

import (
	"errors"
	"sync"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
)

var _ blob.Fuller = (*Store)(nil)

// fullLogEvery bounds how often the log says that the store is full.
const fullLogEvery = time.Minute

// fullness remembers writes that were refused.
type fullness struct {
	mu      sync.Mutex // guards what follows
	why     error      // the last refusal
	at      time.Time  // of why
	logged  time.Time  // when the log was told last
	refused int64      // since then
}

// refuse takes note of err, which it returns, if that is a write's for which
// there was no room.
func (s *Store) refuse(err error) error {
	if !errors.Is(err, blob.ErrFull) {
		return err
	}
	s.metrics.refused.Inc()
	f := &s.full
	f.mu.Lock()
	f.why, f.at = err, time.Now()
	f.refused++
	n := f.refused
	say := f.at.Sub(f.logged) >= fullLogEvery
	if say {
		f.logged, f.refused = f.at, 0
	}
	f.mu.Unlock()
	if say {
		s.log.Warn("the store is full, and refuses writes; what it promised to keep stays", "refused", n, "why", err)
	}
	return err
}

// Full implements blob.Fuller.
func (s *Store) Full() error {
	s.full.mu.Lock()
	defer s.full.mu.Unlock()
	if s.full.why == nil || time.Since(s.full.at) > blob.FullFor {
		return nil
	}
	return s.full.why
}
