package compressed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/compress"
	"github.com/mettle-build/mettle/elan/digest"
)

// Open implements blob.Opener. The offset is in bytes of the blob; one into zstd
// costs the decompressing of what is before it.
func (s *Store) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := s.open(ctx, d, offset)
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	return r, nil
}

func (s *Store) open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if offset < 0 || !d.IsZero() && offset > d.Size() {
		return nil, fmt.Errorf("offset %d is outside of it", offset)
	}
	r, f, err := s.container(ctx, d)
	if err != nil || r == nil {
		return &reader{src: bytes.NewReader(nil), cancelled: ctx.Err}, err
	}
	if f == raw {
		s.metrics.through.WithLabelValues("raw").Inc()
		return s.openRaw(ctx, r, d, offset)
	}
	s.metrics.through.WithLabelValues("decompressed").Inc()
	if d.Size() <= compress.SmallBytes {
		return s.openSmall(ctx, r, d, offset)
	}
	return s.openLarge(ctx, r, d, offset)
}

// container opens the container of d behind its header. nil: d is the empty
// blob, and has none.
func (s *Store) container(ctx context.Context, d digest.Digest) (io.ReadCloser, form, error) {
	r, err := s.Store.Open(ctx, d, 0)
	if err != nil {
		return nil, 0, err //nolint:wrapcheck // the store's own
	}
	if d.IsEmpty() {
		return nil, 0, r.Close() //nolint:wrapcheck // the store's own
	}
	var header [headerBytes]byte
	var f form
	if _, err = io.ReadFull(r, header[:]); err == nil {
		f, err = parseHeader(header[:], d.Size())
	}
	if err != nil {
		return nil, 0, errors.Join(ended(err), r.Close())
	}
	return r, f, nil
}

// ended is err, where a container's end is one of them.
func ended(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: its container ends early", blob.ErrCorrupt)
	}
	return err
}

// openRaw opens a blob that is as it is, from r, behind its header.
func (s *Store) openRaw(ctx context.Context, r io.ReadCloser, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if offset > 0 {
		if err := r.Close(); err != nil || offset == d.Size() {
			return &reader{src: bytes.NewReader(nil), cancelled: ctx.Err}, err //nolint:wrapcheck // the store's own
		}
		var err error
		if r, err = s.Store.Open(ctx, d, headerBytes+offset); err != nil {
			return nil, err //nolint:wrapcheck // the store's own
		}
	}
	return &reader{src: r, due: d.Size() - offset, cancelled: ctx.Err, free: r.Close}, nil
}

// openSmall decompresses a blob at once.
func (s *Store) openSmall(ctx context.Context, r io.ReadCloser, d digest.Digest, offset int64) (io.ReadCloser, error) {
	data, err := io.ReadAll(io.LimitReader(r, blob.MaxContainer(d.Size())))
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, err
	}
	if data, err = s.codec.Decode(data, d.Size()); err != nil {
		return nil, err //nolint:wrapcheck // it says what it is of
	}
	return &reader{src: bytes.NewReader(data[offset:]), due: d.Size() - offset, cancelled: ctx.Err}, nil
}

// openLarge decompresses a blob while it is read.
func (s *Store) openLarge(ctx context.Context, r io.ReadCloser, d digest.Digest, offset int64) (io.ReadCloser, error) {
	select {
	case s.readers <- struct{}{}:
	case <-ctx.Done():
		return nil, errors.Join(fmt.Errorf("wait for a decoder: %w", ctx.Err()), r.Close())
	}
	dec, err := s.codec.NewReader(r, d.Size())
	if err != nil {
		<-s.readers
		return nil, errors.Join(err, r.Close())
	}
	free := func() error {
		err := errors.Join(dec.Close(), r.Close())
		<-s.readers
		return err
	}
	if _, err := io.CopyN(io.Discard, dec, offset); err != nil {
		return nil, errors.Join(ended(err), free())
	}
	return &reader{src: dec, due: d.Size() - offset, cancelled: ctx.Err, free: free}, nil
}

// reader reads the bytes of a blob, of which due are to come.
type reader struct {
	src       io.Reader
	due       int64
	cancelled func() error // the Err of the context that bounds the reading
	free      func() error // nil: nothing is held
	err       error        // the end
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if r.err = r.cancelled(); r.err != nil {
		return 0, r.err
	}
	if r.due == 0 {
		return 0, io.EOF
	}
	n, err := r.src.Read(p[:min(int64(len(p)), r.due)])
	r.due -= int64(n)
	if err != nil && r.due > 0 {
		r.err = ended(err)
		if n > 0 {
			return n, nil // and the error next time
		}
		return 0, r.err
	}
	return n, nil
}

// Close implements io.Closer. It may be called twice.
func (r *reader) Close() error {
	if r.err == nil && r.due > 0 {
		r.err = io.ErrClosedPipe
	}
	if r.free == nil {
		return nil
	}
	free := r.free
	r.free = nil
	return free()
}

// OpenCompressed implements blob.CompressedOpener.
func (s *Store) OpenCompressed(ctx context.Context, d digest.Digest) (io.ReadCloser, error) {
	r, f, err := s.container(ctx, d)
	if err == nil && r != nil && f == raw {
		err = r.Close()
	}
	if err == nil && (r == nil || f == raw) {
		err = blob.ErrNotCompressed
	}
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	s.metrics.through.WithLabelValues("passed_through").Inc()
	return r, nil
}
