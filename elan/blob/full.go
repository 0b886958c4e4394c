package blob

import "time"

// FullFor is for how long after a refused write a store counts as full.
const FullFor = time.Minute

// Fuller is a store that can be full, which operators want to know: builds fail
// or get slow then, though nothing is broken.
type Fuller interface {
	// Full returns why the last write was refused, an error that wraps ErrFull,
	// if that was within FullFor, and nil otherwise.
	Full() error
}
