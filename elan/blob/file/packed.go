package file

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file/pack"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// DefaultMaxPackedBytes is up to where a file of its own costs clearly more:
	// making it takes some 40 µs of CPU, whatever its size, and writing 16 KiB
	// again when their segment is cleaned 10 to 15 (README.md).
	DefaultMaxPackedBytes = 16 << 10
	// maxPackedEntryBytes is the largest entry that is packed. Most are far
	// smaller; those with inlined outputs can be larger.
	maxPackedEntryBytes = 64 << 10
	// minPackedCapacity is the least that a store must be able to hold for
	// packing: below it the index would take a good part of it.
	minPackedCapacity = 8 << 20
	// segmentsPerStore is how many segments of equal size the store would have
	// if it had nothing else: a head and what cleaning needs are little then.
	segmentsPerStore = 64
	minSegmentBytes  = 128 << 10

	packsDir = "packs"
)

// packed is what of the store is in packs.
type packed struct {
	store    *pack.Store // nil: there are no packs
	max      int64       // bytes of the largest blob that is put there; negative: none is
	maxEntry int         // bytes of the largest entry
	// blobFiles says that blobs of at most max bytes may be in files alone, which
	// an older version or another max left. A store that was counted knows.
	blobFiles atomic.Bool
	// noEntryFiles is 0 as long as nobody knows whether there are files of
	// entries, then 1 where there are none, and from the first one on -1.
	noEntryFiles atomic.Int32
}

// openPacks opens the packs, or makes them, unless there are none and are to be
// none. The space is known by then.
func (s *Store) openPacks(o Options) error {
	p := &s.packed
	p.blobFiles.Store(true)
	p.max = -1
	segment := int64(minSegmentBytes)
	capacity := min(s.space.max, s.space.total)
	if o.MaxPackedBytes >= 0 && capacity >= minPackedCapacity {
		for segment < pack.MaxSegmentBytes && segment*2 <= capacity/segmentsPerStore {
			segment *= 2
		}
		// A segment holds some records at least.
		p.max = min(o.MaxPackedBytes, segment/8, pack.MaxRecordBytes/2)
		p.maxEntry = int(min(maxPackedEntryBytes, segment/4))
		// Cleaning needs room for what it moves before it has removed a segment.
		s.space.spare = segment
		if s.space.max != math.MaxInt64 {
			s.space.max -= segment
		}
	} else if _, err := os.Lstat(s.dir + "/" + packsDir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var err error
	p.store, err = pack.New(pack.Options{
		Dir: s.dir + "/" + packsDir, SegmentBytes: segment, TouchEvery: s.touchEvery, Untrusted: s.recovery.untrusted,
		Grew: s.space.grow, Damaged: s.quarantineRecord, Logger: s.log,
	})
	if err != nil {
		return err
	}
	// What the packs have was taken off the free space, in which it was not.
	_, err = s.space.refresh()
	return err
}

func (s *Store) closePacks() error {
	if s.packed.store == nil {
		return nil
	}
	return s.packed.store.Close()
}

// packable reports whether d is put into the packs.
func (s *Store) packable(d digest.Digest) bool { return d.Size() <= s.packed.max && !d.IsEmpty() }

// mayBePacked reports whether d may be in the packs: one that was put there once
// stays, whatever is put there now.
func (s *Store) mayBePacked(d digest.Digest) bool {
	return s.packed.store != nil && d.Size() < pack.MaxRecordBytes && !d.IsEmpty()
}

// onlyPacked reports whether d is in the packs or nowhere. A file that it has
// beside is a copy.
func (s *Store) onlyPacked(d digest.Digest) bool {
	return s.packable(d) && !s.packed.blobFiles.Load()
}

// findPacked reports whether d is in the packs, starting its lifetime anew, and
// where it is not, whether it may be a file. It makes no system call.
func (s *Store) findPacked(ctx context.Context, d digest.Digest) (there, mayBeFile bool, err error) {
	if !s.mayBePacked(d) {
		return false, true, nil
	}
	only := s.onlyPacked(d) // asked first: what becomes a file later is a copy
	var buf keyBuffer
	there, err = s.packed.store.Find(ctx, appendBlobKey(buf[:0], d))
	return there, !there && !only, err
}

// hasPacked is findPacked for those who do not use the blob.
func (s *Store) hasPacked(d digest.Digest) bool {
	if !s.mayBePacked(d) {
		return false
	}
	var buf keyBuffer
	return s.packed.store.Has(appendBlobKey(buf[:0], d))
}

// readPacked returns the bytes of d, if it is in the packs: pread. Where it is
// not, the error is blob.ErrNotFound.
func (s *Store) readPacked(ctx context.Context, d digest.Digest) ([]byte, error) {
	if !s.mayBePacked(d) {
		return nil, blob.ErrNotFound
	}
	var buf keyBuffer
	data, err := s.packed.store.Get(ctx, appendBlobKey(buf[:0], d))
	if err == nil && int64(len(data)) != d.Size() {
		return nil, fmt.Errorf("%w: its record has %d bytes", blob.ErrUnavailable, len(data)) // its key says its size
	}
	return data, err
}

// putPacked makes data the blob d: pwrite. There must be room for it: see
// packedBytes.
func (s *Store) putPacked(d digest.Digest, data []byte) error {
	var buf keyBuffer
	_, err := s.packed.store.Put(pack.Record{Key: appendBlobKey(buf[:0], d), Value: data})
	if err == nil {
		s.soil()
	}
	return err
}

// packedBytes is what d takes in the packs.
func packedBytes(d digest.Digest) int64 {
	var buf keyBuffer
	return pack.RecordBytes(len(appendBlobKey(buf[:0], d)), int(d.Size()))
}

// storePacked is all of a Create for bytes that are in memory.
func (s *Store) storePacked(ctx context.Context, d digest.Digest, data []byte) error {
	if s.have(ctx, d) {
		return nil
	}
	n := packedBytes(d)
	if err := s.reserveBytes(ctx, n); err != nil {
		return err
	}
	if err := s.putPacked(d, data); err != nil {
		s.space.cancel(n)
		return s.refuse(err)
	}
	s.space.settleBytes(n)
	return nil
}

// quarantineRecord keeps what stood in place of a damaged record for a look.
func (s *Store) quarantineRecord(raw []byte) {
	s.metrics.corrupt.Inc()
	folder := s.dir + "/quarantine"
	kept, err := os.ReadDir(folder)
	if err != nil || len(kept) >= maxQuarantined || len(raw) == 0 {
		return
	}
	name := folder + "/record." + strconv.FormatInt(time.Now().UnixNano(), 36)
	if err := os.WriteFile(name, raw, regularPerm); err != nil {
		s.log.Error("keeping a damaged record for a look", "path", name, "error", err)
	}
}

// packWriter is a small blob being written.
type packWriter struct {
	s      *Store
	ctxErr func() error // of the context that bounds the writing
	d      digest.Digest

	mu       sync.Mutex // guards what follows: ReadAt may be called beside Write
	data     []byte
	reserved int64 // bytes for which space is counted; 0 when they are written
	closed   bool
}

var _ io.ReaderAt = (*packWriter)(nil)

// createPacked is Create of a small blob: no system call until Commit, which is
// pwrite.
func (s *Store) createPacked(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	n := packedBytes(d)
	if err := s.reserveBytes(ctx, n); err != nil {
		return nil, err
	}
	return &packWriter{s: s, ctxErr: ctx.Err, d: d, data: make([]byte, 0, d.Size()), reserved: n}, nil
}

func (w *packWriter) Write(p []byte) (int, error) {
	if err := w.ctxErr(); err != nil {
		return 0, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return 0, errors.New("write to a closed blob")
	}
	if int64(len(w.data)+len(p)) > w.d.Size() {
		w.closed = true // so that it can't be committed any more
		return 0, fmt.Errorf("%w: more than the %d bytes of %s", blob.ErrCorrupt, w.d.Size(), w.d)
	}
	w.data = append(w.data, p...)
	return len(p), nil
}

// ReadAt implements io.ReaderAt, as that of a large blob does.
func (w *packWriter) ReadAt(p []byte, off int64) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return 0, errors.New("read of a blob that is not being written")
	}
	if off >= int64(len(w.data)) {
		return 0, io.EOF
	}
	n := copy(p, w.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Commit makes the blob visible: pwrite. Nobody else uses w meanwhile.
func (w *packWriter) Commit() error {
	if err := w.ctxErr(); err != nil {
		return err
	}
	if w.closed || w.reserved == 0 {
		return errors.New("commit of a closed blob")
	}
	if int64(len(w.data)) != w.d.Size() {
		return fmt.Errorf("%w: %d bytes of %s were written", blob.ErrCorrupt, len(w.data), w.d)
	}
	if err := w.s.putPacked(w.d, w.data); err != nil {
		return w.s.refuse(err)
	}
	w.s.space.settleBytes(w.reserved)
	w.reserved = 0
	return nil
}

func (w *packWriter) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	if w.reserved > 0 {
		w.s.space.cancel(w.reserved)
		w.reserved = 0
	}
	return nil
}

// makePackedTwin makes the file of d, which is in the packs, in that mode, once
// however many want it: pread, and then openat, write, fchmod, close, utimensat,
// renameat.
func (s *Store) makePackedTwin(ctx context.Context, d digest.Digest, mode blob.LinkMode) error {
	if err := s.reserveBlob(ctx, d); err != nil {
		return err
	}
	made, err := s.replaceBy(ctx, d, mode, true)
	if err != nil || !made {
		s.space.cancel(onDisk(d.Size()))
		return err
	}
	s.settle(d.Size())
	return nil
}

// bytesToTmp makes a file in tmp with data, ready to be renamed into place.
func (s *Store) bytesToTmp(data []byte, mode blob.LinkMode) (string, error) {
	tmp := s.tmpPath()
	fd, err := openFile(tmp, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	err = writeAll(fd, data)
	if err == nil {
		err = unix.Fchmod(fd, perm(mode))
	}
	if e := unix.Close(fd); err == nil {
		err = e
	}
	if err == nil {
		err = setTimes(tmp, time.Now())
	}
	if err != nil {
		_ = unix.Unlink(tmp)
		return "", err
	}
	return tmp, nil
}
