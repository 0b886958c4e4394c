package blob

import (
	"errors"
	"time"
)

// BusyError is an ErrUnavailable of a store that is there, and asks its callers to
// come again later: they are over a rate, or it is short of memory. It is not
// ErrFull: that there is no room for blobs is not what it says.
type BusyError struct {
	Reason string        // what the store said
	After  time.Duration // how long it wants to be left alone; 0: it did not say
}

// Error implements error.
func (e *BusyError) Error() string {
	return ErrUnavailable.Error() + ", it asks to be tried again later: " + e.Reason
}

// Is has it be an ErrUnavailable.
func (e *BusyError) Is(target error) bool { return target == ErrUnavailable }

// RetryAfter is how long the store that failed with err wants to be left alone; 0
// where it did not say.
func RetryAfter(err error) time.Duration {
	if busy, ok := errors.AsType[*BusyError](err); ok {
		return max(busy.After, 0)
	}
	return 0
}
