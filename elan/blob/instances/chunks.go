package instances

import (
	"context"
	"errors"
	"slices"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// ChunkParams implements blob.Chunker. They are zero where the store is none.
func (v view) ChunkParams() blob.ChunkParams {
	if v.chunker == nil {
		return blob.ChunkParams{}
	}
	return v.chunker.ChunkParams()
}

// Split implements blob.Chunker. Chunks are of the instance, like their blob.
func (v view) Split(ctx context.Context, d digest.Digest, prefer blob.ChunkFunction) (blob.ChunkList, error) {
	d, err := v.in(d)
	if err == nil && v.chunker == nil {
		err = errors.ErrUnsupported
	}
	if err != nil {
		return blob.ChunkList{}, err
	}
	l, err := v.chunker.Split(ctx, d, prefer)
	for i, c := range l.Chunks {
		l.Chunks[i] = c.Plain()
	}
	return l, plain(err)
}

// Splice implements blob.Chunker.
func (v view) Splice(ctx context.Context, d digest.Digest, l blob.ChunkList) error {
	d, err := v.in(d)
	if err == nil && v.chunker == nil {
		err = errors.ErrUnsupported
	}
	if err != nil {
		return err
	}
	l.Chunks = slices.Clone(l.Chunks) // they are the caller's
	for i, c := range l.Chunks {
		if l.Chunks[i], err = v.in(c); err != nil {
			return err
		}
	}
	return plain(v.chunker.Splice(ctx, d, l))
}
