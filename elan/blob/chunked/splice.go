package chunked

import (
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Splice implements blob.Chunker. All the bytes are read and hashed once: a list
// is kept only of chunks that are the blob.
func (s *Store) Splice(ctx context.Context, d digest.Digest, l blob.ChunkList) error {
	how, err := s.splice(ctx, d, l)
	if err != nil {
		how = spliceFailed
	}
	s.metrics.splices.WithLabelValues(how).Inc()
	if err != nil {
		return fmt.Errorf("splice blob %s: %w", d, err)
	}
	return nil
}

func (s *Store) splice(ctx context.Context, d digest.Digest, l blob.ChunkList) (how string, err error) {
	if d.IsZero() {
		return "", fmt.Errorf("%w: the digest is absent", digest.ErrInvalid)
	}
	chunks, err := checkChunks(d, l.Chunks)
	if err != nil {
		return "", err
	}
	missing, err := s.FindMissing(ctx, append([]digest.Digest{d}, chunks...))
	switch {
	case err != nil:
		return "", err
	case !slices.Contains(missing, d):
		return splicePresent, nil
	case len(missing) > 1:
		gone := missing[slices.IndexFunc(missing, func(m digest.Digest) bool { return m != d })]
		return "", fmt.Errorf("%w: %d of its chunks are missing, %s is one", blob.ErrNotFound, len(missing)-1, gone)
	}
	if chunks, err = s.flatten(ctx, chunks); err != nil {
		return "", err
	}
	r, err := newReader(ctx, s.Store, chunks, 0)
	if err != nil {
		return "", err
	}
	defer r.Close() //nolint:errcheck // opened for reading
	if !s.mayBeKept(d) || int64(len(chunks)) > d.Size()/s.minChunk {
		return spliceWhole, blob.Receive(ctx, s.Store, d, r) //nolint:wrapcheck // it says what was received
	}
	if err := verify(r, d); err != nil {
		return "", fmt.Errorf("its chunks: %w", err)
	}
	return spliceKept, s.save(ctx, keptKey(d), blob.ChunkList{Function: known(l.Function), Chunks: chunks})
}

// verifyBytes are hashed at once.
const verifyBytes = 256 << 10

// verify reads r to its end. Bytes that are not d's wrap blob.ErrCorrupt.
func verify(r io.Reader, d digest.Digest) error {
	_, err := io.CopyBuffer(onlyWriter{io.Discard}, digest.NewVerifier(r, d.Plain()), make([]byte, verifyBytes))
	return err //nolint:wrapcheck // it says what is wrong
}

// onlyWriter hides io.Discard's ReadFrom, which would read in portions of 8 KiB.
type onlyWriter struct{ io.Writer }

// known is fn, where it is one that there is.
func known(fn blob.ChunkFunction) blob.ChunkFunction {
	if fn > blob.ChunkRepMaxCDC {
		return blob.ChunkUnknown
	}
	return fn
}

// checkChunks returns the chunks without empty ones, if they can be d by their
// sizes. It looks at no bytes.
func checkChunks(d digest.Digest, chunks []digest.Digest) ([]digest.Digest, error) {
	if len(chunks) > maxChunks {
		return nil, fmt.Errorf("%w: %d chunks, at most %d are taken", blob.ErrTooLarge, len(chunks), maxChunks)
	}
	left := d.Size()
	full := make([]digest.Digest, 0, len(chunks))
	for _, c := range chunks {
		switch {
		case c.IsZero() || c.Function() != d.Function() || c.Space() != d.Space() && !c.IsEmpty():
			return nil, fmt.Errorf("%w: a chunk is not of the blob's digest function and space", digest.ErrInvalid)
		case c.Size() > left:
			return nil, fmt.Errorf("%w: its chunks have more bytes than it", blob.ErrCorrupt)
		}
		if left -= c.Size(); !c.IsEmpty() {
			full = append(full, c)
		}
	}
	if left > 0 {
		return nil, fmt.Errorf("%w: its chunks have %d bytes less than it", blob.ErrCorrupt, left)
	}
	return full, nil
}

// flatten replaces chunks that are kept in chunks themselves by theirs, so that
// no list leads to another.
func (s *Store) flatten(ctx context.Context, chunks []digest.Digest) ([]digest.Digest, error) {
	if !slices.ContainsFunc(chunks, s.mayBeKept) {
		return chunks, nil
	}
	missing, err := s.Store.FindMissing(ctx, chunks)
	if err != nil || len(missing) == 0 {
		return chunks, err //nolint:wrapcheck // the store's own words
	}
	inner := make(map[digest.Digest][]digest.Digest, len(missing))
	total := len(chunks)
	for _, d := range missing {
		l, err := s.kept(ctx, d)
		if err != nil {
			return nil, fmt.Errorf("chunk %s: %w", d, err)
		}
		inner[d] = l.Chunks
		if total += len(l.Chunks); total > maxChunks {
			return nil, errTooMany
		}
	}
	flat := make([]digest.Digest, 0, total)
	for _, d := range chunks {
		if parts, ok := inner[d]; ok {
			flat = append(flat, parts...)
		} else {
			flat = append(flat, d)
		}
		if len(flat) > maxChunks {
			return nil, errTooMany
		}
	}
	return flat, nil
}

var errTooMany = fmt.Errorf("%w: its chunks are in chunks, of which there are over %d", blob.ErrTooLarge, maxChunks)
