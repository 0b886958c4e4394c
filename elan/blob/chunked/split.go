package chunked

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/chunk"
	"github.com/mettle-build/mettle/elan/digest"
)

// Split implements blob.Chunker. A blob that no chunk of the function could be
// larger than is its own and only chunk. One that is kept in chunks, or has been
// split before, is not read. Otherwise it is cut now, and its chunks are stored
// beside it; of callers who want the same, one cuts and the others wait.
func (s *Store) Split(ctx context.Context, d digest.Digest, prefer blob.ChunkFunction) (blob.ChunkList, error) {
	l, how, err := s.split(ctx, d, prefer)
	if err != nil {
		how = splitFailed
		err = fmt.Errorf("split blob %s: %w", d, err)
	}
	s.metrics.splits.WithLabelValues(how).Inc()
	return l, err
}

func (s *Store) split(ctx context.Context, d digest.Digest, prefer blob.ChunkFunction) (l blob.ChunkList, how string, err error) {
	if d.IsZero() {
		return l, "", fmt.Errorf("%w: the digest is absent", digest.ErrInvalid)
	}
	fn, cut := s.function(prefer)
	if d.Size() <= int64(cut.MaxBytes()) {
		l, err = s.single(ctx, d, fn)
		return l, splitKnown, err
	}
	if d.Size()/int64(cut.MinBytes()) > 4*maxChunks { // the average is at most four times the least
		return l, "", fmt.Errorf("%w: %w, being too large", blob.ErrNotFound, errNoList)
	}
	key := splitKey(d, fn)
	for {
		l, found, err := s.find(ctx, d, key, cut)
		if err != nil || found {
			return l, splitKnown, err
		}
		leave, wait := s.flights.enter(key)
		if leave == nil {
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				return l, "", ctx.Err()
			}
		}
		defer leave()
		l, err = s.cut(ctx, d, cut)
		if err != nil {
			return l, "", err
		}
		l.Function = fn
		return l, splitCut, s.save(ctx, key, l)
	}
}

// function is how to cut for somebody who prefers a function.
func (s *Store) function(prefer blob.ChunkFunction) (blob.ChunkFunction, chunk.Function) {
	if prefer == blob.ChunkRepMaxCDC {
		return prefer, s.repMax
	}
	return blob.ChunkFastCDC2020, s.fast
}

// single is the list of a blob that is its own chunk.
func (s *Store) single(ctx context.Context, d digest.Digest, fn blob.ChunkFunction) (blob.ChunkList, error) {
	missing, err := s.FindMissing(ctx, []digest.Digest{d})
	switch {
	case err != nil:
		return blob.ChunkList{}, err
	case len(missing) > 0:
		return blob.ChunkList{}, blob.ErrNotFound
	case d.IsEmpty():
		return blob.ChunkList{Function: fn}, nil
	}
	return blob.ChunkList{Function: fn, Chunks: []digest.Digest{d}}, nil
}

// find looks for a list of d whose chunks are there, and small enough: that in
// which it is kept, or that of an earlier Split. It starts the lifetimes anew.
// Where d is not there, the error wraps blob.ErrNotFound.
func (s *Store) find(ctx context.Context, d digest.Digest, key blob.EntryKey, cut chunk.Function) (blob.ChunkList, bool, error) {
	var lists []blob.ChunkList
	for _, load := range []func() (blob.ChunkList, error){
		func() (blob.ChunkList, error) { return s.kept(ctx, d) },
		func() (blob.ChunkList, error) { return s.load(ctx, d, key) },
	} {
		l, err := load()
		if err != nil && !errors.Is(err, blob.ErrNotFound) {
			return l, false, err
		}
		lists = append(lists, l) // empty where there is none
	}
	whole, err := s.complete(ctx, append(lists, blob.ChunkList{Chunks: []digest.Digest{d}}))
	if err != nil {
		return blob.ChunkList{}, false, err
	}
	isKept := whole[0] && len(lists[0].Chunks) > 0
	if !isKept && !whole[2] {
		return blob.ChunkList{}, false, blob.ErrNotFound
	}
	if isKept && fit(lists[0].Chunks, cut) {
		return lists[0], true, nil
	}
	if whole[1] && len(lists[1].Chunks) > 0 && fit(lists[1].Chunks, cut) {
		return lists[1], true, nil
	}
	return blob.ChunkList{}, false, nil
}

// fit reports whether no chunk is larger than the function makes them: clients
// refuse those. Smaller ones they take.
func fit(chunks []digest.Digest, cut chunk.Function) bool {
	for _, c := range chunks {
		if c.Size() > int64(cut.MaxBytes()) {
			return false
		}
	}
	return true
}

// pendingBytes are cut before the store is asked which of the chunks it lacks.
const pendingBytes = 8 << 20

// storeParallel is how many chunks are written at once.
const storeParallel = 8

// cut reads d, verifies it, and stores its chunks.
func (s *Store) cut(ctx context.Context, d digest.Digest, f chunk.Function) (blob.ChunkList, error) {
	select {
	case s.splits <- struct{}{}:
		defer func() { <-s.splits }()
	case <-ctx.Done():
		return blob.ChunkList{}, ctx.Err()
	}
	r, err := s.Open(ctx, d, 0)
	if err != nil {
		return blob.ChunkList{}, err
	}
	defer r.Close() //nolint:errcheck // opened for reading
	var l blob.ChunkList
	p := pending{store: s.Store, buf: make([]byte, 0, pendingBytes+f.MaxBytes())}
	for cr := chunk.NewReader(digest.NewVerifier(r, d.Plain()), f); ; {
		data, err := cr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return blob.ChunkList{}, fmt.Errorf("read it: %w", err)
		}
		if len(l.Chunks) == maxChunks {
			return blob.ChunkList{}, fmt.Errorf("%w: %w, being too large", blob.ErrNotFound, errNoList)
		}
		c := digest.Of(d.Function(), data).In(d.Space())
		l.Chunks = append(l.Chunks, c)
		if err := p.add(ctx, c, data); err != nil {
			return blob.ChunkList{}, err
		}
	}
	return l, p.flush(ctx)
}

// pending are chunks that have been cut, and may have to be stored.
type pending struct {
	store  blob.Store
	buf    []byte
	chunks []digest.Digest
	data   map[digest.Digest][]byte // parts of buf
}

func (p *pending) add(ctx context.Context, d digest.Digest, data []byte) error {
	if len(p.buf)+len(data) > cap(p.buf) {
		if err := p.flush(ctx); err != nil {
			return err
		}
	}
	if p.data == nil {
		p.data = map[digest.Digest][]byte{}
	}
	if _, again := p.data[d]; again {
		return nil
	}
	start := len(p.buf)
	p.buf = append(p.buf, data...)
	p.chunks = append(p.chunks, d)
	p.data[d] = p.buf[start:]
	return nil
}

// flush stores those that are missing.
func (p *pending) flush(ctx context.Context) error {
	missing, err := p.store.FindMissing(ctx, p.chunks)
	if err != nil {
		return fmt.Errorf("find chunks: %w", err)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(storeParallel)
	for _, d := range missing {
		group.Go(func() error { return put(ctx, p.store, d, p.data[d]) })
	}
	err = group.Wait()
	p.buf, p.chunks = p.buf[:0], p.chunks[:0]
	clear(p.data)
	return err //nolint:wrapcheck // put's
}

// put stores a chunk, whose digest has just been computed.
func put(ctx context.Context, c blob.Creator, d digest.Digest, data []byte) error {
	w, err := c.Create(ctx, d)
	if err != nil {
		return fmt.Errorf("create chunk %s: %w", d, err)
	}
	defer w.Close() //nolint:errcheck // after Commit there is nothing to lose, before it nothing to keep
	if _, err := w.Write(data); err != nil {
		return fmt.Errorf("write chunk %s: %w", d, err)
	}
	if err := w.Commit(); err != nil {
		return fmt.Errorf("commit chunk %s: %w", d, err)
	}
	return nil
}

// errNoList is why Split has no answer about a blob that is there.
var errNoList = errors.New("it can't be had in chunks")
