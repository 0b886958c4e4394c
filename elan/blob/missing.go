package blob

import (
	"fmt"

	"github.com/mettle-build/mettle/elan/digest"
)

// MissingError says which blobs something needs and the store does not have. At
// the edge it becomes FAILED_PRECONDITION with one MISSING violation a blob, so
// that a client can upload them and try again. It matches ErrNotFound.
type MissingError struct {
	// Digests are the missing blobs, at least one.
	Digests []digest.Digest
}

// Error names the first of the blobs and counts the others.
func (e *MissingError) Error() string {
	if len(e.Digests) == 1 {
		return fmt.Sprintf("blob %s is missing", e.Digests[0])
	}
	return fmt.Sprintf("blob %s and %d others are missing", e.Digests[0], len(e.Digests)-1)
}

// Is makes errors.Is(e, ErrNotFound) true.
func (e *MissingError) Is(target error) bool { return target == ErrNotFound }
