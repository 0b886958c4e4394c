package asset

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
)

// flight is a fetch that runs, and that several requests may wait for. It goes on
// when its callers' deadlines pass, so that who asks again finds it or what it
// brought; it ends when all of them have given up by themselves.
type flight struct {
	id     flightID
	cancel context.CancelCauseFunc
	done   chan struct{} // closed at the end
	resp   Response      // set before that
	err    error         // set before that

	began time.Time
	asked time.Time // the Oldest of the request that began it

	// Guarded by the Service's mutex.
	deadline time.Time
	timer    *time.Timer
	waiters  int
	fixed    bool // a caller's deadline passed: it goes on without callers
}

// serves tells whether what f brings is new enough for w, as with entries.
func (f *flight) serves(w *want) bool {
	return w.oldest.IsZero() || !f.began.Before(w.oldest) || f.asked.Equal(w.oldest)
}

// deadlineSlack is how much sooner than a deadline passes here a client may have
// cut the call off for it.
const deadlineSlack = time.Second

// fly joins the flight for w, or begins one that does fetch, and waits for it.
func (s *Service) fly(ctx context.Context, w *want, fetch func(context.Context) (Response, error)) (Response, error) {
	timeout := s.o.Timeout
	if w.timeout > 0 && w.timeout < timeout {
		timeout = w.timeout
	}
	f, err := s.board(ctx, w, timeout, fetch)
	if err != nil {
		return Response{}, err
	}
	late := time.NewTimer(timeout)
	defer late.Stop()
	select {
	case <-f.done:
		return f.resp, f.err
	case <-late.C:
		// Another request gave the flight more time.
		s.leave(f, true)
		return Response{}, &FetchError{Reason: TimedOut, URI: w.uris[0], Err: errTimeout}
	case <-ctx.Done():
		deadline, ok := ctx.Deadline()
		passed := errors.Is(ctx.Err(), context.DeadlineExceeded) || (ok && time.Until(deadline) < deadlineSlack)
		s.leave(f, passed)
		return Response{}, fmt.Errorf("fetch from %s: %w", origin(w.uris[0]), ctx.Err())
	}
}

// board returns a flight that the caller waits for, and must leave or see ended.
func (s *Service) board(ctx context.Context, w *want, timeout time.Duration, fetch func(context.Context) (Response, error)) (*flight, error) {
	now := time.Now()
	deadline := now.Add(timeout)
	k := flightKey(w)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	for _, f := range s.flights[k] {
		if f.serves(w) {
			f.waiters++
			if deadline.After(f.deadline) {
				f.deadline = deadline
				f.timer.Reset(timeout)
			}
			return f, nil
		}
	}
	if len(s.aloft) >= maxFlights {
		return nil, &FetchError{Reason: Busy, URI: w.uris[0], Err: fmt.Errorf("%d fetches are under way already", len(s.aloft))}
	}
	// It belongs to all who wait, and ends by its own timer.
	flying, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	f := &flight{id: k, cancel: cancel, done: make(chan struct{}), began: now.UTC(), asked: w.oldest, deadline: deadline, waiters: 1}
	f.timer = time.AfterFunc(timeout, func() { cancel(errTimeout) })
	s.flights[k] = append(s.flights[k], f)
	s.aloft[f] = struct{}{}
	s.running.Go(func() {
		f.resp, f.err = s.runFlight(flying, fetch)
		if f.err != nil && flying.Err() != nil {
			f.err = interrupted(context.Cause(flying), f.err, w)
		}
		f.timer.Stop()
		cancel(nil)
		s.mu.Lock()
		delete(s.aloft, f)
		s.ground(f)
		s.mu.Unlock()
		close(f.done)
	})
	return f, nil
}

// ground lets nobody board f any more. The caller holds mu.
func (s *Service) ground(f *flight) {
	left := slices.DeleteFunc(s.flights[f.id], func(x *flight) bool { return x == f })
	if len(left) == 0 {
		delete(s.flights, f.id)
		return
	}
	s.flights[f.id] = left
}

// runFlight waits for its turn and fetches.
func (s *Service) runFlight(ctx context.Context, fetch func(context.Context) (Response, error)) (Response, error) {
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return Response{}, ctx.Err()
	}
	defer func() { <-s.slots }()
	return fetch(ctx)
}

// interrupted is the error of a fetch that was ended early, for a cause, and
// failed with err then.
func interrupted(cause, err error, w *want) error {
	if !errors.Is(cause, errTimeout) {
		return cause
	}
	uri := w.uris[0]
	if f, ok := errors.AsType[*FetchError](err); ok && f.URI != "" {
		uri = f.URI
	}
	return &FetchError{Reason: TimedOut, URI: uri, Err: errTimeout}
}

// leave takes a caller from f. The last one that gives up ends it.
func (s *Service) leave(f *flight, goOn bool) {
	s.mu.Lock()
	f.waiters--
	f.fixed = f.fixed || goOn
	abandoned := f.waiters == 0 && !f.fixed
	if abandoned {
		s.ground(f)
	}
	s.mu.Unlock()
	if abandoned {
		f.cancel(errAbandoned)
	}
}

// flightKey tells requests apart that must not share a fetch: those that may get
// different content, or get it with different rights.
func flightKey(w *want) flightID {
	qs := slices.Concat(w.known, w.secret)
	for _, u := range w.uris[1:] {
		qs = append(qs, Qualifier{"", u})
	}
	return flightID(key(w, "flight "+string(w.kind), w.uris[0], qs))
}

// flightID is comparable.
type flightID blob.EntryKey
