package blob

import (
	"context"
	"errors"
	"fmt"

	"github.com/mettle-build/mettle/elan/digest"
)

// What follows are abilities of stores, and of decorators around them, that keep
// small blobs in another way than large ones, and have no need for a reader or a
// writer of each: most blobs are small, and come and go in batches. ReadInto,
// ReceiveBytes and the like find them by type assertion. Where a blob is not one
// of those, the error is errors.ErrUnsupported itself, and nothing was done.

// WholeReader reads blobs in one call.
type WholeReader interface {
	// ReadWhole fills data, which has as many bytes as d, as reading what Open
	// gives does.
	ReadWhole(ctx context.Context, d digest.Digest, data []byte) error
}

// WholeWriter writes blobs in one call.
type WholeWriter interface {
	// WriteWhole does with data, the bytes of d, as a Writer of Create does. It
	// does not verify, nor keep data.
	WriteWhole(ctx context.Context, d digest.Digest, data []byte) error
}

// readWhole reads d in one call, if o can do so.
func readWhole(ctx context.Context, o Opener, d digest.Digest, data []byte) (done bool, err error) {
	w, ok := o.(WholeReader)
	if !ok {
		return false, nil
	}
	switch err := w.ReadWhole(ctx, d, data); {
	case err == nil:
		return true, nil
	case errors.Is(err, errors.ErrUnsupported):
		return false, nil
	default:
		return true, fmt.Errorf("read blob %s: %w", d, err)
	}
}

// writeWhole writes d in one call, if c can do so.
func writeWhole(ctx context.Context, c Creator, d digest.Digest, data []byte) (done bool, err error) {
	w, ok := c.(WholeWriter)
	if !ok {
		return false, nil
	}
	switch err := w.WriteWhole(ctx, d, data); {
	case err == nil:
		return true, nil
	case errors.Is(err, errors.ErrUnsupported):
		return false, nil
	default:
		return true, fmt.Errorf("write blob %s: %w", d, err)
	}
}
