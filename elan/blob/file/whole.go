package file

import (
	"context"
	"errors"
	"fmt"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

var (
	_ blob.WholeReader = (*Store)(nil)
	_ blob.WholeWriter = (*Store)(nil)
)

// ReadWhole implements blob.WholeReader for blobs in the packs: pread.
func (s *Store) ReadWhole(ctx context.Context, d digest.Digest, data []byte) error {
	if !s.mayBePacked(d) || int64(len(data)) != d.Size() {
		return errors.ErrUnsupported
	}
	if err := s.check(ctx, d); err != nil {
		return err
	}
	only := s.onlyPacked(d)
	var buf keyBuffer
	err := s.packed.store.Read(ctx, appendBlobKey(buf[:0], d), data)
	if errors.Is(err, blob.ErrNotFound) && !only {
		return errors.ErrUnsupported
	}
	return err
}

// WriteWhole implements blob.WholeWriter for blobs that are put into the packs:
// pwrite.
func (s *Store) WriteWhole(ctx context.Context, d digest.Digest, data []byte) error {
	if !s.packable(d) {
		return errors.ErrUnsupported
	}
	if int64(len(data)) != d.Size() {
		return fmt.Errorf("%w: %d bytes", blob.ErrCorrupt, len(data))
	}
	if err := s.check(ctx, d); err != nil {
		return err
	}
	return s.storePacked(ctx, d, data)
}
