package observed

import (
	"context"
	"errors"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

var (
	_ blob.WholeReader = (*Store)(nil)
	_ blob.WholeWriter = (*Store)(nil)
)

// ReadWhole implements blob.WholeReader where the store inside does: it counts
// as an open and a read.
func (s *Store) ReadWhole(ctx context.Context, d digest.Digest, data []byte) error {
	w, ok := s.Store.(blob.WholeReader)
	if !ok {
		return errors.ErrUnsupported
	}
	start := time.Now()
	inside, span := s.open.begin(ctx, d)
	err := w.ReadWhole(inside, d, data)
	if errors.Is(err, errors.ErrUnsupported) {
		return err //nolint:wrapcheck // as the contract asks; a span without an end is none
	}
	end(span, err)
	s.open.done(ctx, d, start, err)
	if err == nil {
		s.bytesRead.Add(float64(len(data)))
		s.read.count(outcome(nil))
	}
	return err //nolint:wrapcheck // the store's own
}

// WriteWhole implements blob.WholeWriter where the store inside does.
func (s *Store) WriteWhole(ctx context.Context, d digest.Digest, data []byte) error {
	w, ok := s.Store.(blob.WholeWriter)
	if !ok {
		return errors.ErrUnsupported
	}
	start := time.Now()
	inside, span := s.write.begin(ctx, d)
	err := w.WriteWhole(inside, d, data)
	if errors.Is(err, errors.ErrUnsupported) {
		return err //nolint:wrapcheck // as the contract asks; a span without an end is none
	}
	end(span, err)
	s.write.done(ctx, d, start, err)
	if err == nil {
		s.bytesWritten.Add(float64(len(data)))
	}
	return err //nolint:wrapcheck // the store's own
}
