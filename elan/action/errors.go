package action

import "errors"

// The classes of errors that are this package's own. The others are blob's.
var (
	// ErrInvalid is wrapped by the errors about results that are malformed: the
	// fault is in what somebody sent.
	ErrInvalid = errors.New("invalid action result")
	// ErrNotCacheable is wrapped by the error about a result that nobody may be
	// given for a later execution: its command failed.
	ErrNotCacheable = errors.New("action result is not cacheable")
	// ErrForbidden is wrapped by the errors about somebody who may not set results.
	ErrForbidden = errors.New("may not update action results")
)
