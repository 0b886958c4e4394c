package blob

import "context"

// Repeater is a Store that waits for a store that is away, and tries again. It is
// found by As; elan/blob/retry has it.
type Repeater interface {
	// Repeat calls f until its error is none that wraps ErrUnavailable, or that has
	// been so for too long, or ctx is done. With the context that f gets, the store
	// repeats nothing itself, so that an outage is waited for once.
	Repeat(ctx context.Context, f func(ctx context.Context) error) error
}

// Repeat calls f, which uses s: again, as long as s can't answer, where s is a
// Repeater, and once where it is not. It is for what s itself can't repeat, such as
// Receive of a large blob, of which the caller has the bytes: f opens them anew.
func Repeat(ctx context.Context, s any, f func(ctx context.Context) error) error {
	if r, ok := As[Repeater](s); ok {
		return r.Repeat(ctx, f) //nolint:wrapcheck // f's own
	}
	return f(ctx)
}
