package blob

import (
	"context"

	"github.com/mettle-build/mettle/elan/digest"
)

// ChunkFunction says how a blob was cut into chunks, or is to be.
type ChunkFunction uint8

// The functions of the Remote Execution API (see elan/chunk), and what is said
// where there is none or it is not known.
const (
	ChunkUnknown ChunkFunction = iota
	ChunkFastCDC2020
	ChunkRepMaxCDC
)

// ChunkList is a blob in pieces: the chunks, one after the other, are the blob.
// Chunks are blobs with digests of the same function; one may occur repeatedly.
type ChunkList struct {
	Function ChunkFunction
	Chunks   []digest.Digest
}

// ChunkParams is how a Chunker cuts, which its clients should do alike.
type ChunkParams struct {
	FastCDCAverageBytes   int
	FastCDCSeed           uint32
	RepMaxCDCMinimumBytes int
	RepMaxCDCHorizonBytes int
	// MaxChunks is the largest number of chunks that a blob may have.
	MaxChunks int
}

// Chunker is a Store that takes blobs in chunks, and tells of those it has in
// which chunks they can be had. It is found by As.
type Chunker interface {
	// ChunkParams never change. They are zero where this is a decorator of a store
	// that is no Chunker, and all else fails.
	ChunkParams() ChunkParams
	// Split returns chunks of d, all of which are in the store from now on; the
	// lifetimes of d and of the chunks start anew. The chunks are at most as large
	// as the preferred function makes them, or the first one where the preference
	// is ChunkUnknown, but may have been made by another. Where d is not in the
	// store, or can't be had in chunks, the error wraps ErrNotFound. The caller
	// owns the list.
	Split(ctx context.Context, d digest.Digest, prefer ChunkFunction) (ChunkList, error)
	// Splice makes the blob d of chunks that are in the store. It does nothing
	// where d is there. Where a chunk is not, the error wraps ErrNotFound; where
	// the chunks are not d, ErrCorrupt; where there are more than MaxChunks,
	// ErrTooLarge. It does not keep l.
	Splice(ctx context.Context, d digest.Digest, l ChunkList) error
}
