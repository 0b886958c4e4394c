package file

import (
	"context"
	"errors"
	"fmt"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file/pack"
	"github.com/mettle-build/mettle/elan/digest"
)

// checkPacked reads the record of d and compares it with d: pread. The error
// wraps ErrNotFound where d is not in the packs, and ErrCorrupt where its record
// was withdrawn.
func (s *Store) checkPacked(ctx context.Context, d digest.Digest) error {
	if !s.mayBePacked(d) {
		return blob.ErrNotFound
	}
	var buf keyBuffer
	key := appendBlobKey(buf[:0], d)
	i, err := s.packed.store.Peek(ctx, key)
	if err != nil {
		return err
	}
	got := digest.Of(d.Function(), i.Value)
	if got == d.Plain() {
		return nil
	}
	// Its checksum is right: what is wrong was so when it came in.
	if _, err := s.packed.store.Delete(ctx, key); err != nil {
		return err
	}
	s.log.Error("blob is corrupt, and withdrawn", "digest", d.String(), "why", "its bytes have the digest "+got.String())
	s.quarantineRecord(i.Value)
	return fmt.Errorf("%w: its bytes have the digest %s", blob.ErrCorrupt, got)
}

// checkTwins looks at the files of a packed blob. They are copies, and made
// again where they are needed.
func (s *Store) checkTwins(done <-chan struct{}, d digest.Digest, p pace) error {
	for _, mode := range []blob.LinkMode{blob.LinkRegular, blob.LinkExecutable} {
		err := s.checkFile(done, d, mode, p)
		if err != nil && !errors.Is(err, blob.ErrNotFound) && !errors.Is(err, blob.ErrCorrupt) {
			return err
		}
	}
	return nil
}

// verifyPacks reads all records at the pace p. The error is errGivenUp, or wraps
// ErrUnavailable. It returns how many were damaged, and withdrawn.
func (s *Store) verifyPacks(p pace) (damaged int64, err error) {
	if s.packed.store == nil {
		return 0, nil
	}
	v, err := s.packed.store.Verify(s.closing, func(n int64) error {
		if !p(n) {
			return errGivenUp
		}
		return nil
	})
	if errors.Is(err, pack.ErrStopped) {
		err = errGivenUp
	}
	return v.Damaged, err
}
