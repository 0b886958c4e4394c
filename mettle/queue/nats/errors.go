package nats

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/mettle-build/mettle/mettle/queue"
)

var (
	// errConflict: the record has been changed by somebody else meanwhile.
	errConflict = errors.New("the lease's record was changed")
	// errContended: that happened time and again.
	errContended = fmt.Errorf("%w: a lease's record kept changing", queue.ErrUnavailable)
	// errDuplicate: there is a job of that name.
	errDuplicate = errors.New("the job is in the queue")
	// errNoMessage: a stream has no such message.
	errNoMessage = errors.New("no such message")
)

// codeStoreFailed is the broker's error that a limit of a stream is reached. Which
// one is told by its text only.
const codeStoreFailed jetstream.ErrorCode = 10077

// classify gives an error of the client library its class.
func (q *Queue) classify(err error) error {
	var api *jetstream.APIError
	switch {
	case err == nil || errors.Is(err, queue.ErrUnavailable):
		return err
	case errors.Is(err, natsgo.ErrConnectionClosed), errors.Is(err, natsgo.ErrConnectionDraining):
		return fmt.Errorf("%w: %w", queue.ErrClosed, err)
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return fmt.Errorf("%w: %w", errNoMessage, err)
	case errors.As(err, &api):
		return classifyAPI(api)
	case errors.Is(err, natsgo.ErrMaxPayload), errors.Is(err, natsgo.ErrBadSubject):
		return err
	case errors.Is(err, context.Canceled):
		return err
	}
	// Timeouts, missing responders, lost connections and whatever else.
	q.mu.Lock()
	violation := q.violation
	q.mu.Unlock()
	if violation != nil {
		return fmt.Errorf("%w: %w (a right may be lacking: %w)", queue.ErrUnavailable, err, violation)
	}
	return fmt.Errorf("%w: %w", queue.ErrUnavailable, err)
}

// classifyConnect gives an error of connecting its class.
func classifyConnect(err error) error {
	for _, refusal := range []error{natsgo.ErrAuthorization, natsgo.ErrAuthExpired, natsgo.ErrAuthRevoked, natsgo.ErrAccountAuthExpired} {
		if errors.Is(err, refusal) {
			return fmt.Errorf("%w: %w: %w", queue.ErrUnavailable, queue.ErrRefused, err)
		}
	}
	if cert := new(tls.CertificateVerificationError); errors.As(err, &cert) { // theirs; ours is their word
		return fmt.Errorf("%w: %w: %w", queue.ErrUnavailable, queue.ErrRefused, err)
	}
	return fmt.Errorf("%w: %w", queue.ErrUnavailable, err)
}

// refusedOr makes err, of a connection that has just been made, a refusal where
// the broker has said that a right is lacking.
func (q *Queue) refusedOr(err error) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.violation != nil && errors.Is(err, queue.ErrUnavailable) {
		return fmt.Errorf("%w: %w", queue.ErrRefused, err)
	}
	return err
}

func classifyAPI(err *jetstream.APIError) error {
	switch {
	case err.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence,
		err.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant:
		return fmt.Errorf("%w: %w", errConflict, err)
	case err.ErrorCode == codeStoreFailed && strings.Contains(err.Description, "maximum messages per subject"):
		return fmt.Errorf("%w: %w", errDuplicate, err)
	case err.ErrorCode == codeStoreFailed && strings.Contains(err.Description, "maximum"):
		return fmt.Errorf("%w: %w", queue.ErrFull, err)
	case err.Code >= http.StatusInternalServerError:
		return fmt.Errorf("%w: %w", queue.ErrUnavailable, err)
	default:
		return err
	}
}

// The waits between tries of a call to a broker that doesn't answer: from a
// hand-over of a stream to another server, to a restart.
const (
	firstRetry = 20 * time.Millisecond
	maxRetry   = 500 * time.Millisecond
	// maxTry bounds a try: what a server of a cluster was asked as it was lost
	// nobody answers, and the connection to another one goes on.
	maxTry = 2500 * time.Millisecond
)

// try calls f until it no longer fails for want of a broker, for as long as
// Options.Timeout. An error is classified, or the context's.
func (q *Queue) try(ctx context.Context, c call, f func(ctx context.Context) error) (err error) {
	leave, err := q.enter()
	if err != nil {
		return err
	}
	defer leave()
	start := time.Now()
	defer func() { q.metrics.observe(c, time.Since(start), err) }()
	callCtx, cancel := context.WithTimeout(ctx, q.opts.Timeout)
	defer cancel()
	for wait := firstRetry; ; wait = min(2*wait, maxRetry) {
		err := q.tryOnce(callCtx, f)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !errors.Is(err, queue.ErrUnavailable) {
			return err
		}
		select {
		case <-time.After(wait):
		case <-callCtx.Done():
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return err
		case <-q.done:
			return queue.ErrClosed
		}
	}
}

// tryOnce calls f under a context that ends with the connection: what was asked
// over it is not answered over the next.
func (q *Queue) tryOnce(ctx context.Context, f func(ctx context.Context) error) error {
	tryCtx, stop := context.WithTimeout(ctx, min(q.opts.Timeout/2, maxTry))
	defer stop()
	q.mu.Lock()
	q.lastTry++
	id := q.lastTry
	q.tries[id] = stop
	q.mu.Unlock()
	err := f(tryCtx)
	q.mu.Lock()
	delete(q.tries, id)
	q.mu.Unlock()
	if errors.Is(err, context.Canceled) && ctx.Err() == nil {
		return fmt.Errorf("%w: the connection was lost", queue.ErrUnavailable)
	}
	return q.classify(err)
}

// onDisconnect ends the tries that are under way.
func (q *Queue) onDisconnect() {
	q.mu.Lock()
	stops := slices.Collect(maps.Values(q.tries))
	q.mu.Unlock()
	for _, stop := range stops {
		stop()
	}
}
