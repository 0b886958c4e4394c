// Package pack keeps small values, each under a key, in few large files: blobs
// and entries of a file store that are not worth a file of their own, since to
// make one costs the kernel more than all that the server does for them.
//
// Records are appended to segments; an index, which is files mapped into memory,
// knows where each is and when it was last used. So to find a record costs no
// system call, to read one costs a pread and to write one a pwrite. Nothing is
// synced; the caller syncs the file system, and tells New when the machine went
// down since: see Options.Untrusted. Every record has a checksum, which is
// compared whenever it is read.
//
// It knows nothing of digests, of lifetimes, or of how much space there is: when
// to evict what is its caller's to say, which is elan/blob/file alone. README.md
// there tells of the format and what it was measured against.
package pack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
)

// Options are what a Store needs. Dir alone is required.
type Options struct {
	// Dir is the directory of the store, of which nothing else may be part. It
	// is made if it is not there; its parent must be.
	Dir string
	// SegmentBytes is the size of a segment, from some records to
	// MaxSegmentBytes, which is the default.
	SegmentBytes int64
	// TouchEvery is how old a recorded last use may be before a use is recorded
	// again. The index counts in whole seconds.
	TouchEvery time.Duration
	// Untrusted: the machine went down while the store was in use, so that the
	// index may not be right, and is made anew from the segments.
	Untrusted bool
	// Grew is called with the bytes of the files that are there, and whenever
	// they became more, or with a negative number fewer, for another reason than
	// the records that Put took: the index grew, a segment began, Clean moved
	// records. It must be quick. nil: nobody is told.
	Grew func(bytes int64)
	// Damaged is called with a copy of what stands in place of a record that was
	// found to be damaged, after it was withdrawn. nil: nobody is told.
	Damaged func(raw []byte)
	// Logger is told of recovery and cleaning. nil: nobody is.
	Logger *slog.Logger
}

// Store is a set of records. All methods are safe for concurrent use. After
// Close they fail with an error that wraps blob.ErrUnavailable.
type Store struct {
	segmentBytes int64
	staleAfter   uint32 // seconds
	grew         func(int64)
	damaged      func([]byte)
	log          *slog.Logger

	secret  *secret
	segs    segments
	index   *index
	hot     head          // of what is put
	cold    head          // of what is moved
	old     *index        // from which the last uses are taken while the index is made anew
	rebuilt chan struct{} // closed when the index has all that is there

	closing   chan struct{}
	closeOnce sync.Once
	closeErr  error
	running   sync.WaitGroup
	// cleaning is held by what removes segments, and guards unsynced: the segments
	// that records were moved to, and that may not be on the disk yet.
	cleaning sync.Mutex
	unsynced []*segment

	// fdatasync is that of the kernel; tests watch it.
	fdatasync func(fd int) error
}

// New opens the store in o.Dir. It takes no longer with many records, except
// that where the index must be made anew, that goes on in the background, and
// calls about records that were not seen yet wait for its end.
func New(o Options) (*Store, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	s := &Store{
		segmentBytes: o.SegmentBytes,
		staleAfter:   uint32(o.TouchEvery / time.Second), //nolint:gosec // hours
		grew:         o.Grew,
		damaged:      o.Damaged,
		log:          o.Logger,
		rebuilt:      make(chan struct{}),
		closing:      make(chan struct{}),
		fdatasync:    unix.Fdatasync,
	}
	if err := s.open(o); err != nil {
		return nil, fmt.Errorf("open packs: %w", err)
	}
	return s, nil
}

func (o *Options) validate() error {
	if o.SegmentBytes == 0 {
		o.SegmentBytes = MaxSegmentBytes
	}
	switch {
	case o.Dir == "":
		return errors.New("packs: no directory given")
	case o.SegmentBytes < firstRecord+recordAlign || o.SegmentBytes > MaxSegmentBytes:
		return fmt.Errorf("packs: segments of %d bytes; at most %d", o.SegmentBytes, MaxSegmentBytes)
	case o.TouchEvery < 0:
		return fmt.Errorf("packs: touching every %v", o.TouchEvery)
	}
	if o.Grew == nil {
		o.Grew = func(int64) {}
	}
	if o.Damaged == nil {
		o.Damaged = func([]byte) {}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

func (s *Store) open(o Options) error {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return err
	}
	var err error
	if s.secret, err = loadSecret(o.Dir); err != nil {
		return err
	}
	s.segs.grew = o.Grew
	if err = s.segs.load(o.Dir); err != nil {
		return err
	}
	if err = s.openIndex(o); err != nil {
		return err
	}
	if s.old != nil || len(s.segs.all()) == 0 {
		return nil
	}
	// The last segment goes on where it ends.
	for _, seg := range s.segs.all() {
		if s.hot.seg == nil || seg.id > s.hot.seg.id {
			s.hot.seg = seg
		}
	}
	return nil
}

// openIndex opens the index, or begins a new one, which is filled in the
// background.
func (s *Store) openIndex(o Options) error {
	dir := filepath.Join(o.Dir, "index")
	_, err := os.Lstat(dir + oldSuffix)
	interrupted := err == nil
	if !o.Untrusted && !interrupted {
		s.index, err = openIndex(dir, s.secret.check(), &s.segs, s.grew)
		switch {
		case err == nil:
			close(s.rebuilt)
			return nil
		case !errors.Is(err, errBadTable):
			return err
		}
		s.log.Error("the index of the packs is damaged: it is made anew", "error", err)
	}
	return s.beginRebuild(dir, interrupted)
}

// Close ends what goes on in the background and frees what the store holds.
// Calls that are under way should have ended. Closing again does nothing.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		close(s.closing)
		s.running.Wait()
		s.closeErr = s.index.close()
		if s.old != nil {
			s.closeErr = errors.Join(s.closeErr, s.old.close())
		}
		s.segs.closeAll()
	})
	return s.closeErr
}

// Rebuilt is closed when the index has all that is there: at once, unless New
// found that it must be made anew.
func (s *Store) Rebuilt() <-chan struct{} { return s.rebuilt }

func (s *Store) isRebuilt() bool { return stopped(s.rebuilt) }

// waitRebuilt waits until the index has all that is there. The error is
// ErrStopped.
func (s *Store) waitRebuilt(done <-chan struct{}) error {
	select {
	case <-s.rebuilt:
		return nil
	case <-done:
	case <-s.closing:
	}
	return ErrStopped
}

// waitRebuiltFor is waitRebuilt for those who have a context.
func (s *Store) waitRebuiltFor(ctx context.Context) error {
	if s.waitRebuilt(ctx.Done()) == nil {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return errClosed
}

// Bytes are the sizes of the files: of the segments, of the records in them
// that are not replaced or deleted, and of the index.
func (s *Store) Bytes() (segments, live, index int64) {
	segments, live = s.segs.sums()
	return segments, live, s.index.bytes.Load()
}

// Records is the number of records, nearly.
func (s *Store) Records() int64 { return s.index.records() }

func nowSeconds() uint32 { return uint32(time.Now().Unix()) } //nolint:gosec // until 2106

// Find reports whether there is a record of key, and records the use. It does
// not look at the record itself.
func (s *Store) Find(ctx context.Context, key []byte) (bool, error) {
	l, err := s.find(ctx, s.secret.hash(key))
	return l.isRecord(), err
}

// find is noRecord only if there is none for sure.
func (s *Store) find(ctx context.Context, h hashed) (location, error) {
	known := s.isRebuilt() // asked first: the index has all after it
	l, err := s.index.find(h, nowSeconds(), s.staleAfter)
	if err != nil || l.isRecord() || known {
		return l, err
	}
	if err := s.waitRebuiltFor(ctx); err != nil {
		return noRecord, err
	}
	return s.index.find(h, nowSeconds(), s.staleAfter)
}

// Delete removes the record of key, if there is one, and reports whether there
// was.
func (s *Store) Delete(ctx context.Context, key []byte) (bool, error) {
	// A record that was not seen yet would come back.
	if err := s.waitRebuiltFor(ctx); err != nil {
		return false, err
	}
	l, ok := s.index.remove(s.secret.hash(key), noRecord)
	if !ok {
		return false, nil
	}
	return true, s.bury(l)
}

// bury marks the record at l, to which the index does not point any more, as
// dead, so that it does not come back when the index is made anew: pwrite.
func (s *Store) bury(l location) error {
	seg := s.segs.all()[l.segment()]
	if seg == nil {
		return nil
	}
	fd, err := s.segs.acquire(seg)
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer s.segs.release(seg)
	if err := pwriteFull(fd, s.secret.deadMagic(), l.offset()); err != nil {
		return fmt.Errorf("%w: %w", blob.ErrUnavailable, err)
	}
	return nil
}
