package chunked

import (
	"context"
	"errors"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

var (
	_ blob.WholeReader = (*Store)(nil)
	_ blob.WholeWriter = (*Store)(nil)
)

// ReadWhole implements blob.WholeReader: what is never kept in chunks is the
// store's inside.
func (s *Store) ReadWhole(ctx context.Context, d digest.Digest, data []byte) error {
	w, ok := s.Store.(blob.WholeReader)
	if !ok || s.mayBeKept(d) {
		return errors.ErrUnsupported
	}
	return w.ReadWhole(ctx, d, data) //nolint:wrapcheck // the store's own words
}

// WriteWhole implements blob.WholeWriter.
func (s *Store) WriteWhole(ctx context.Context, d digest.Digest, data []byte) error {
	w, ok := s.Store.(blob.WholeWriter)
	if !ok {
		return errors.ErrUnsupported
	}
	return w.WriteWhole(ctx, d, data) //nolint:wrapcheck // the store's own words
}
