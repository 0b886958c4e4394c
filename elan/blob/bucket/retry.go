package bucket

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
)

// Retry is how often and how fast a request is tried again.
type Retry struct {
	Attempts int
	Backoff  time.Duration
	Timeout  time.Duration // of one attempt
}

// Retry returns the part of o that the pieces of an Upload need.
func (o *Options) Retry() Retry {
	return Retry{Attempts: o.Attempts, Backoff: o.Backoff, Timeout: o.Timeout}
}

// Do calls f until it succeeds, fails for good, or has failed r.Attempts times.
// The context that f gets ends with f's call. Where ctx is done the error is
// that of ctx.
func (r Retry) Do(ctx context.Context, f func(ctx context.Context) error) error {
	for attempt := 1; ; attempt++ {
		err := r.once(ctx, f)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case !transient(err):
			return err
		case attempt >= r.Attempts:
			return fmt.Errorf("after %d attempts: %w", attempt, err)
		}
		if err := r.wait(ctx, attempt); err != nil {
			return err
		}
	}
}

func (r Retry) once(ctx context.Context, f func(ctx context.Context) error) error {
	attempt, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	err := f(attempt)
	if err != nil && attempt.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("%w: no answer within %v", ErrTransient, r.Timeout)
	}
	return err
}

// wait waits before the attempt that follows the attempt-th: a random part of a
// time that doubles, so that those who failed together do not come back together.
func (r Retry) wait(ctx context.Context, attempt int) error {
	bound := min(r.Backoff<<min(attempt-1, 20), maxBackoff)
	t := time.NewTimer(bound/4 + rand.N(bound*3/4+1)) //nolint:gosec // spreads load, keeps no secret
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// try makes a request for the operation op, again where that may help, and
// counts each attempt.
func (s *Store) try(ctx context.Context, op string, f func(ctx context.Context) error) error {
	return class(s.o.Retry().Do(ctx, func(ctx context.Context) error {
		err := f(ctx)
		s.metrics.request(op, err)
		return err
	}))
}

// class puts what failed for another reason than the callers know of into
// blob.ErrUnavailable: this store can't answer, which says nothing of the blob.
func class(err error) error {
	if err == nil || inClass(err) {
		return err
	}
	return fmt.Errorf("%w: %w", blob.ErrUnavailable, err)
}

// errGone hides that a request found something missing which is not the object.
var errGone = errors.New("not found, but not the object: is the bucket gone?")

// written is the error of a write, for which there is no "not found".
func written(err error) error {
	if errors.Is(err, blob.ErrNotFound) {
		return errGone
	}
	return err
}
