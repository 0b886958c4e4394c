// Package file is the blob.Store of one local directory: a large blob is a file
// whose name is the index, small ones share files (see pack, below this package),
// and the kernel's page cache is the only cache. It keeps the entries of an
// ActionCache too, and hands blobs out and takes them in as files: see Linker,
// Adopter and Auditor in elan/blob.
//
// It survives kill -9 at any moment without losing what it acknowledged, and a
// power failure without ever serving a wrong byte; it holds itself to a size
// and to a reserve of free disk by evicting what was used least recently, and
// refuses writes sooner than break the lifetime that it promises. README.md in
// this folder tells how, with the system calls of each operation.
//
// It does not verify what it is given (blob.Receive does), does not compress,
// and does not share its directory with another process: a lock file sees to
// that. Network file systems are not supported. Linux only.
//
// elan/blob/open makes it for file:// URLs, and mettle's dual mode directly:
//
//	s, err := file.New(file.Options{Dir: "/var/lib/elan", MaxBytes: 100 << 30})
package file

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// DefaultMinLifetime is what Bazel 7 and later assume of a cache whose outputs
// they do not download (--experimental_remote_cache_ttl).
const DefaultMinLifetime = 3 * time.Hour

// Options are the manual of a Store. Dir alone is required.
type Options struct {
	// Dir is the directory of the store. It is made if it is not there. One
	// that holds other things is refused.
	Dir string
	// MaxBytes bounds the disk space of blobs and entries, each counted in
	// whole blocks of 4 KiB. 0: bounded by the free disk space only.
	MaxBytes int64
	// MinFreeBytes is the disk space that is to stay free for others. 0: a
	// twentieth of the file system, and at most 2 GiB. Negative: none.
	MinFreeBytes int64
	// MinLifetime is for how long a blob or an entry stays, at least, after its
	// last use. 0: DefaultMinLifetime.
	MinLifetime time.Duration
	// MaxPackedBytes is the size of the largest blob that shares a file with
	// others; larger ones are files of their own. 0: DefaultMaxPackedBytes.
	// Negative: each blob is a file, as each is in a store of less than 8 MiB.
	MaxPackedBytes int64
	// ScrubBytesPerSecond bounds how fast the store is read in the background to
	// find what the disk damaged. 0: DefaultScrubBytesPerSecond. Negative: it is
	// not read.
	ScrubBytesPerSecond int64
	// ScrubEvery is how long after the beginning of one such pass over all files
	// the next may begin. 0: DefaultScrubEvery.
	ScrubEvery time.Duration
	// Logger is told of corruption, recovery, eviction and fullness. nil: nobody
	// is.
	Logger *slog.Logger
	// Registerer takes the metrics. nil: there are none.
	Registerer prometheus.Registerer

	bootID string // "": that of the kernel; tests set another
}

// Store is a directory of blobs and entries. All methods are safe for
// concurrent use. After Close they fail.
type Store struct {
	dir         string
	casDir      string // with a slash at its end
	acDir       string // with a slash at its end
	tmpDir      string // with a slash at its end
	uid         uint32
	needChmod   bool // the umask, or a default ACL, changes the mode of new files
	minLifetime time.Duration
	touchEvery  time.Duration
	log         *slog.Logger
	metrics     *metrics

	// prepared tells the digest functions whose folders are there.
	prepared [256]atomic.Bool
	tmpSeq   atomic.Uint64
	keys     keyLocks
	space    space
	full     fullness
	recovery recovery
	packed   packed
	changed  changes
	trusted  trusted
	dirty    atomic.Bool // something was committed since the last checkpoint

	counted   chan struct{} // closed when what was there at the start is counted
	lock      *os.File
	closing   chan struct{} // closed by Close, to stop the goroutines
	closeOnce sync.Once
	closeErr  error
	running   sync.WaitGroup

	// linkat is os.Link; tests let it fail as a file with too many links does.
	linkat func(oldname, newname string) error
}

var (
	_ blob.Store   = (*Store)(nil)
	_ blob.Entries = (*Store)(nil)
	_ blob.Linker  = (*Store)(nil)
	_ blob.Adopter = (*Store)(nil)
	_ blob.Auditor = (*Store)(nil)
	_ io.Closer    = (*Store)(nil)
)

// New opens the store in o.Dir, making it where there is none, and starts its
// goroutines, which Close ends. It does not look at the blobs, so that it takes
// no longer with ten million of them. Where another process has the store open,
// the error names it.
func New(o Options) (*Store, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", o.Dir, err)
	}
	s := &Store{
		dir:         dir,
		casDir:      dir + "/cas/",
		acDir:       dir + "/ac/",
		tmpDir:      dir + "/tmp/",
		uid:         uint32(os.Geteuid()), //nolint:gosec // user ids have 32 bits
		minLifetime: o.MinLifetime,
		touchEvery:  min(o.MinLifetime/4, maxTouchEvery),
		log:         o.Logger,
		closing:     make(chan struct{}),
		counted:     make(chan struct{}),
		linkat:      os.Link,
	}
	s.trusted.init()
	if err := s.open(o); err != nil {
		if s.lock != nil {
			err = errors.Join(err, s.lock.Close())
		}
		return nil, fmt.Errorf("open store %s: %w", dir, err)
	}
	s.running.Go(s.keepSpace)
	s.running.Go(s.keepDurable)
	if o.ScrubBytesPerSecond > 0 {
		s.running.Go(func() { s.keepScrubbed(o.ScrubBytesPerSecond, o.ScrubEvery) })
	}
	return s, nil
}

func (o *Options) validate() error {
	switch {
	case o.Dir == "":
		return errors.New("file store: no directory given")
	case o.MaxBytes < 0:
		return fmt.Errorf("file store: size bound of %d bytes is negative", o.MaxBytes)
	case o.ScrubEvery < 0:
		return fmt.Errorf("file store: time between scrubs %v is negative", o.ScrubEvery)
	case o.MinLifetime < 0:
		return fmt.Errorf("file store: minimal lifetime %v is negative", o.MinLifetime)
	}
	if o.MaxPackedBytes == 0 {
		o.MaxPackedBytes = DefaultMaxPackedBytes
	}
	if o.ScrubBytesPerSecond == 0 {
		o.ScrubBytesPerSecond = DefaultScrubBytesPerSecond
	}
	if o.ScrubEvery == 0 {
		o.ScrubEvery = DefaultScrubEvery
	}
	if o.MinLifetime == 0 {
		o.MinLifetime = DefaultMinLifetime
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// open does the part of New that touches the disk.
func (s *Store) open(o Options) error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	var err error
	if s.lock, err = lockDir(s.dir); err != nil {
		return err
	}
	s.keys.init()
	if err := s.checkVersion(); err != nil {
		return err
	}
	if err := s.recovery.begin(s, o.bootID); err != nil {
		return err
	}
	if err := s.layOut(); err != nil {
		return err
	}
	if err := s.space.init(s.dir, o.MaxBytes, o.MinFreeBytes); err != nil {
		return err
	}
	if s.metrics, err = newMetrics(o.Registerer, s); err != nil {
		return err
	}
	if err := s.openPacks(o); err != nil {
		s.metrics.unregister()
		return err
	}
	return nil
}

// Close stops the background work, makes everything durable, and lets others
// open the directory. Calls that are under way should have ended. Closing again
// does nothing.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		close(s.closing)
		s.running.Wait()
		s.metrics.unregister()
		err := errors.Join(s.closePacks(), s.checkpoint(true))
		s.closeErr = errors.Join(err, s.lock.Close())
	})
	return s.closeErr
}

// check is what every operation begins with.
func (s *Store) check(ctx context.Context, d digest.Digest) error {
	if d.IsZero() {
		return fmt.Errorf("%w: the digest is absent", digest.ErrInvalid)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-s.closing:
		return fmt.Errorf("%w: it is closed", blob.ErrUnavailable)
	default:
		return nil
	}
}

// classify wraps an error of the operating system, about the store's own files,
// in its class.
func classify(err error) error {
	if noSpace(err) {
		return fmt.Errorf("%w: %w", blob.ErrFull, err)
	}
	return fmt.Errorf("%w: %w", blob.ErrUnavailable, err)
}

// noSpace reports whether the disk, or the user's share of it, is full.
func noSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}
