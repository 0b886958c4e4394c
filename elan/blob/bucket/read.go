package bucket

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

//nolint:gochecknoglobals // an immutable table
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC32C is the checksum that buckets keep of an object.
func CRC32C(data []byte) uint32 { return crc32.Checksum(data, castagnoli) }

// Open implements blob.Opener: one request. A connection that breaks, or yields
// nothing for Options.Timeout, is replaced by one that goes on where it ended.
// A blob that is read from its first byte is held against the bucket's CRC32C,
// where it has one.
func (s *Store) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := s.open(ctx, d, offset)
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	return r, nil
}

func (s *Store) open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if err := s.check(ctx, d); err != nil {
		return nil, err
	}
	if offset < 0 || offset > s.limit(d) {
		return nil, fmt.Errorf("offset %d is outside of it", offset)
	}
	if offset == d.Size() && (d.IsEmpty() || !s.o.Containers) {
		return s.openEnd(ctx, d)
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case s.reads <- struct{}{}:
	}
	r := &reader{s: s, d: d, size: d.Size(), off: offset, cancelled: ctx.Err}
	r.resume = func() error { return r.reconnect(ctx) }
	first, err := r.connect(ctx)
	if transient(err) {
		err = r.retry(ctx, err)
		first = r.object
	}
	if err == nil && !s.fits(first.SizeBytes, d) {
		r.disconnect()
		err = ErrRange
	}
	if errors.Is(err, ErrRange) {
		s.log.Error("object has the wrong size, and is taken as missing", "object", s.blobName(d))
		err = blob.ErrNotFound
	}
	if err != nil {
		<-s.reads
		return nil, class(err)
	}
	r.size = first.SizeBytes
	if offset == 0 {
		r.want = first.CRC32C
	}
	s.touches.seen(first)
	return r, nil
}

// openEnd opens d at its end, where no range begins.
func (s *Store) openEnd(ctx context.Context, d digest.Digest) (io.ReadCloser, error) {
	if !d.IsEmpty() {
		st, err := s.statOne(ctx, s.blobName(d))
		if err != nil {
			return nil, err
		}
		if !st.Exists || st.SizeBytes != d.Size() {
			return nil, blob.ErrNotFound
		}
		s.touches.seen(st.Object)
	}
	return io.NopCloser(bytes.NewReader(nil)), nil
}

// reader reads one blob, over one connection after the other.
type reader struct {
	s         *Store
	d         digest.Digest
	size      int64 // of the object
	off       int64
	cancelled func() error // the Err of the context that bounds the reading
	resume    func() error // connects again, under that context

	body     io.ReadCloser
	object   Object             // that of body
	cancel   context.CancelFunc // ends body
	stall    *time.Timer        // cancels body, unless it is stopped
	failures int                // since the last byte

	sum  uint32  // of the bytes read
	want *uint32 // of all bytes; nil: not known
	err  error   // the end

	closed bool // and the slot given back
}

// connect makes one attempt at a connection from r.off on.
func (r *reader) connect(ctx context.Context) (Object, error) {
	attempt, cancel := context.WithCancel(ctx)
	stall := time.AfterFunc(r.s.o.Timeout, cancel)
	body, object, err := r.s.driver.Get(attempt, r.s.blobName(r.d), r.off)
	stall.Stop()
	if err != nil && attempt.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w: no answer within %v", ErrTransient, r.s.o.Timeout)
	}
	r.s.metrics.request("get", err)
	if err != nil {
		cancel()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return Object{}, err
	}
	r.body, r.object, r.cancel, r.stall = body, object, cancel, stall
	return object, nil
}

// retry connects after err, until the attempts are used up.
func (r *reader) retry(ctx context.Context, err error) error {
	for transient(err) {
		r.failures++
		if r.failures >= r.s.o.Attempts {
			return fmt.Errorf("after %d attempts: %w", r.failures, err)
		}
		if err := r.s.o.Retry().wait(ctx, r.failures); err != nil {
			return err
		}
		_, err = r.connect(ctx)
	}
	return err
}

// reconnect replaces a connection that broke.
func (r *reader) reconnect(ctx context.Context) error {
	r.disconnect()
	err := r.retry(ctx, fmt.Errorf("%w: the connection broke at byte %d of %d", ErrTransient, r.off, r.size))
	if err == nil && r.object.SizeBytes != r.size {
		return ErrRange
	}
	return err
}

func (r *reader) disconnect() {
	if r.body != nil {
		r.stall.Stop()
		r.cancel()
		_ = r.body.Close() // what is not read is not wanted
		r.body = nil
	}
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	if r.err != nil || len(p) == 0 {
		return 0, r.err
	}
	n, err := r.read(p[:min(int64(len(p)), r.size-r.off)])
	if err != nil {
		r.disconnect()
		r.err = fmt.Errorf("read blob %s: %w", r.d, class(err))
		return 0, r.err
	}
	if r.off == r.size {
		r.err = io.EOF // the next Read's
	}
	return n, nil
}

// read reads at least one byte, or fails.
func (r *reader) read(p []byte) (int, error) {
	for {
		if err := r.cancelled(); err != nil {
			return 0, err
		}
		r.stall.Reset(r.s.o.Timeout)
		n, err := r.body.Read(p)
		r.stall.Stop()
		if n > 0 {
			r.failures = 0
			r.off += int64(n)
			return n, r.verify(p[:n])
		}
		if err == nil {
			continue
		}
		if err := r.cancelled(); err != nil {
			return 0, err
		}
		if err := r.resume(); err != nil {
			return 0, err
		}
	}
}

// verify counts in what was read, and holds back the last bytes of a blob that
// is not what was written.
func (r *reader) verify(p []byte) error {
	if r.want == nil {
		return nil
	}
	r.sum = crc32.Update(r.sum, castagnoli, p)
	if r.off == r.size && r.sum != *r.want {
		return fmt.Errorf("%w: CRC32C is %08x, the bucket's %08x", blob.ErrCorrupt, r.sum, *r.want)
	}
	return nil
}

// Close implements io.Closer. It may be called twice.
func (r *reader) Close() error {
	r.disconnect()
	if r.err == nil {
		r.err = fmt.Errorf("read blob %s: %w", r.d, io.ErrClosedPipe)
	}
	if !r.closed {
		r.closed = true
		<-r.s.reads
	}
	return nil
}
