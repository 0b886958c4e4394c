package blob

import (
	"context"
	"errors"
	"io"
	"math"

	"github.com/mettle-build/mettle/elan/digest"
)

// What follows lets a blob that is kept compressed travel so. They are abilities
// found by As; elan/blob/compressed has them, and the edges use them.

// ErrNotCompressed: the blob can't be had as zstd. It says nothing of whether it is there.
var ErrNotCompressed = errors.New("not kept as zstd")

// CompressedOpener is a Store some of whose blobs are kept as zstd.
type CompressedOpener interface {
	// OpenCompressed returns the whole of d as it is kept, as frames of zstd
	// (RFC 8878) that decompress to the blob. The caller closes the reader.
	// Otherwise it is as Open, or the error wraps ErrNotCompressed, and the caller
	// opens the blob and compresses it.
	OpenCompressed(ctx context.Context, d digest.Digest) (io.ReadCloser, error)
}

// CompressedReceiver is a Store that may keep a blob in the form in which it came.
type CompressedReceiver interface {
	// ReceiveCompressed reads the blob d as frames of zstd from r to its end,
	// verifies what they decompress to, and keeps it: it is Receive for zstd. It
	// takes a window's memory meanwhile; the caller bounds how many there are.
	ReceiveCompressed(ctx context.Context, d digest.Digest, r io.Reader) error
}

// MaxContainer is how many bytes the container of a blob of size bytes may have:
// zstd adds 33 to a MiB that it can't compress.
func MaxContainer(size int64) int64 {
	if n := size + size>>10 + 1<<10; n > size {
		return n
	}
	return math.MaxInt64
}

// A ContainerStore is a Store that keeps under a digest not the blob but a
// container of it, of at most MaxContainer bytes, with which only the one who
// wrote it can do anything. It does not hold the bytes against the
// digest's size, and offsets are those of the container. Nobody but
// elan/blob/compressed reads and writes it. Stores have an option that makes them
// such, and keep containers under other names than blobs, so that one is never
// taken for the other.
type ContainerStore interface {
	Store
	// KeepsContainers reports whether it does, or is a usual store.
	KeepsContainers() bool
}
