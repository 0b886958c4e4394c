package asset

import (
	"context"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// smallBytes is up to where a file of a directory goes into a batch.
	smallBytes = 256 << 10
	// batchFiles and batchBytes bound a batch: one look-up for many files, and what
	// a store with a long way to it takes at once.
	batchFiles  = 1000
	batchBytes  = 16 << 20
	batchWrites = 16
)

// uploader puts the many small files of a directory into the store, in batches,
// and the few large ones by a spool. It is used by one goroutine at a time.
type uploader struct {
	s     *Service
	to    blob.Store
	fn    digest.Function
	due   map[digest.Digest][]byte
	bytes int
	room  int64 // how many bytes may still come
}

func (s *Service) newUploader(to blob.Store, fn digest.Function) *uploader {
	return &uploader{s: s, to: to, fn: fn, due: map[digest.Digest][]byte{}, room: s.o.MaxBytes}
}

// file takes in what r has, to its end. Over the limit of all files together it
// fails with a FetchError.
func (u *uploader) file(ctx context.Context, r io.Reader) (digest.Digest, error) {
	data, err := io.ReadAll(io.LimitReader(r, smallBytes+1))
	if err != nil {
		return digest.Digest{}, err
	}
	if len(data) <= smallBytes {
		if err := u.take(int64(len(data))); err != nil {
			return digest.Digest{}, err
		}
		return u.bytesOf(ctx, data)
	}
	sp := u.s.newSpool(u.to)
	defer sp.Close() //nolint:errcheck // nothing of it is kept
	if err := sp.reset(u.fn, nil); err != nil {
		return digest.Digest{}, err
	}
	sp.max = u.room
	if _, err := sp.Write(data); err != nil {
		return digest.Digest{}, err
	}
	if _, err := io.Copy(sp, r); err != nil {
		return digest.Digest{}, err
	}
	if err := u.take(sp.n); err != nil {
		return digest.Digest{}, err
	}
	return sp.store(ctx)
}

// take counts bytes against the limit.
func (u *uploader) take(n int64) error {
	if u.room -= n; u.room < 0 {
		return failed(TooLarge, "its files have more than the %d bytes that are taken", u.s.o.MaxBytes)
	}
	return nil
}

// bytesOf takes in a blob, which must not be changed any more. It is in the store
// after the next flush.
func (u *uploader) bytesOf(ctx context.Context, data []byte) (digest.Digest, error) {
	d := digest.Of(u.fn, data)
	if _, ok := u.due[d]; ok || d.IsEmpty() {
		return d, nil
	}
	u.due[d] = data
	u.bytes += len(data)
	if len(u.due) < batchFiles && u.bytes < batchBytes {
		return d, nil
	}
	return d, u.flush(ctx)
}

// flush stores what is due.
func (u *uploader) flush(ctx context.Context) error {
	ds := make([]digest.Digest, 0, len(u.due))
	for d := range u.due {
		ds = append(ds, d)
	}
	missing, err := u.to.FindMissing(ctx, ds)
	if err != nil {
		return fmt.Errorf("look up files: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(batchWrites)
	for _, d := range missing {
		data := u.due[d]
		g.Go(func() error {
			_, err := blob.PutBytes(ctx, u.to, u.fn, data)
			return err
		})
	}
	err = g.Wait()
	clear(u.due)
	u.bytes = 0
	return err
}
