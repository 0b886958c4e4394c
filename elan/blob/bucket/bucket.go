// Package bucket is what the stores over object storage have in common: a
// blob.Store and blob.Entries over the few requests that every bucket has. The
// drivers are elan/blob/gcs and elan/blob/s3, which make the Stores; nobody
// else does. What is decided here is the same for both:
//
//   - the names of the objects (names.go);
//   - that a blob becomes visible whole, and is created only where there is none;
//   - which requests are tried again, how often, and how many run at once;
//   - that a blob is missing only where the bucket said so of that object;
//   - lifetimes. The bucket deletes what was not used for Options.ExpireAfter,
//     by a rule of its own (see deploy/). A use is noted at most once in
//     Options.TouchEvery, behind the caller's back. What is so close to its end
//     that the minimal lifetime is not sure counts as missing: the client writes
//     it again, and a new object begins. So the lifetime contract needs neither
//     a race with the bucket's collector to be won nor a touch to succeed.
//
// It keeps nothing on disk, remembers no presence (a decorator does), and does
// not verify what it is given (blob.Receive does).
package bucket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// The defaults of Options.
const (
	// DefaultMinLifetime is what Bazel 7 and later assume.
	DefaultMinLifetime = 3 * time.Hour
	// DefaultExpireAfter is that of the rules in deploy/.
	DefaultExpireAfter = 30 * 24 * time.Hour
	// DefaultMaxRequests is what both Google and Amazon take from a cold bucket
	// without slowing it down: 64 requests of 20 ms each are 3,200/s, and the
	// limits begin at 5,000 and 5,500 reads a second.
	DefaultMaxRequests = 64
	// DefaultMaxReads bounds the blobs that are being read. They are bound by
	// the clients' speed, so that there are more than requests.
	DefaultMaxReads = 512
	// DefaultChunkBytes is what is sent in one request, and held in memory until
	// it is acknowledged. Throughput gains little beyond 8 MiB.
	DefaultChunkBytes = 8 << 20
	// DefaultMaxBufferBytes is for 32 large uploads at once.
	DefaultMaxBufferBytes = 256 << 20
	// DefaultAttempts with the default backoff give up after 3 s on average.
	DefaultAttempts = 6
	// DefaultBackoff is the longest wait before the second attempt. It doubles.
	DefaultBackoff = 200 * time.Millisecond
	// DefaultTimeout is for one request of at most DefaultChunkBytes: 140 kB/s.
	DefaultTimeout = time.Minute

	maxBackoff = 8 * time.Second
	// margin is how long before its end a blob counts as missing, at the least:
	// buckets count in days, and their collectors work with a delay.
	margin = 24 * time.Hour
)

// Options are common to all buckets. The zero Options are valid.
type Options struct {
	// MinLifetime is for how long a blob stays, at least, after its last use.
	// 0: DefaultMinLifetime.
	MinLifetime time.Duration
	// ExpireAfter is after how long without a use the rule of the bucket deletes
	// an object. A rule that deletes earlier breaks the lifetime contract; a
	// later one, or none, is fine. 0: DefaultExpireAfter.
	ExpireAfter time.Duration
	// TouchEvery is how often, at most, a use is written to the bucket: a blob
	// lives for ExpireAfter-TouchEvery, and some hours less, after its last use.
	// 0: the driver's default.
	TouchEvery time.Duration
	// MaxRequests bounds the requests under way. 0: DefaultMaxRequests.
	MaxRequests int
	// MaxReads bounds the blobs being read. 0: DefaultMaxReads.
	MaxReads int
	// ChunkBytes is the size of the pieces in which larger blobs are written.
	// 0: DefaultChunkBytes.
	ChunkBytes int
	// MaxBufferBytes bounds the memory of all blobs being written. 0:
	// DefaultMaxBufferBytes.
	MaxBufferBytes int64
	// Attempts is how often a request is made before its failure is the
	// caller's. 0: DefaultAttempts.
	Attempts int
	// Backoff is the longest wait before the second attempt; it doubles each
	// time, and the wait is a random part of it. 0: DefaultBackoff.
	Backoff time.Duration
	// Timeout bounds one attempt of a request, and how long a blob being read
	// may yield nothing. 0: DefaultTimeout.
	Timeout time.Duration
	// Containers makes it a blob.ContainerStore.
	Containers bool
	// Logger is told of what nobody else is: touches that fail, objects of the
	// wrong size. nil: nobody is.
	Logger *slog.Logger
	// Registerer takes the metrics. nil: there are none.
	Registerer prometheus.Registerer
}

func orDefault[T int | int64 | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Complete checks o and fills in the defaults, touchEvery being the driver's.
func (o *Options) Complete(touchEvery time.Duration) error {
	orDefault(&o.MinLifetime, DefaultMinLifetime)
	orDefault(&o.ExpireAfter, DefaultExpireAfter)
	orDefault(&o.TouchEvery, touchEvery)
	orDefault(&o.MaxRequests, DefaultMaxRequests)
	orDefault(&o.MaxReads, DefaultMaxReads)
	orDefault(&o.ChunkBytes, DefaultChunkBytes)
	orDefault(&o.MaxBufferBytes, DefaultMaxBufferBytes)
	orDefault(&o.Attempts, DefaultAttempts)
	orDefault(&o.Backoff, DefaultBackoff)
	orDefault(&o.Timeout, DefaultTimeout)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	for _, d := range []time.Duration{o.MinLifetime, o.ExpireAfter, o.TouchEvery, o.Backoff, o.Timeout} {
		if d < 0 {
			return fmt.Errorf("a duration of %v is negative", d)
		}
	}
	if o.MaxRequests < 0 || o.MaxReads < 0 || o.ChunkBytes < 0 || o.MaxBufferBytes < 0 || o.Attempts < 0 {
		return errors.New("a bound is negative")
	}
	if int64(o.ChunkBytes) > o.MaxBufferBytes {
		return fmt.Errorf("a chunk of %d bytes does not fit into the buffers' %d", o.ChunkBytes, o.MaxBufferBytes)
	}
	if need := o.TouchEvery + o.margin(); o.ExpireAfter <= need {
		return fmt.Errorf("an expiry of %v leaves no time to use a blob: it has to be over %v, for touches every %v and a minimal lifetime of %v",
			o.ExpireAfter, need, o.TouchEvery, o.MinLifetime)
	}
	return nil
}

// margin is how long before its end a blob counts as missing.
func (o *Options) margin() time.Duration { return max(margin, o.MinLifetime) }

// Store is a bucket of blobs and entries. All methods are safe for concurrent
// use. After Close they fail.
type Store struct {
	driver  Driver
	prefix  string
	o       Options
	log     *slog.Logger
	metrics *metrics
	reads   chan struct{}       // a slot for each blob being read
	buffers *semaphore.Weighted // the bytes of MaxBufferBytes
	touches *touches

	closing   chan struct{}
	closeOnce sync.Once
	closeErr  error
}

var (
	_ blob.Store   = (*Store)(nil)
	_ blob.Entries = (*Store)(nil)
	_ io.Closer    = (*Store)(nil)

	_ blob.ContainerStore = (*Store)(nil)
)

// New makes a Store of the objects of d under prefix; the drivers' New call it.
// The options are complete. It asks whether the bucket is there, and starts
// goroutines, which Close ends. The Store owns d, and closes it where New fails
// too. The context bounds New only.
func New(ctx context.Context, d Driver, prefix string, o Options) (*Store, error) {
	s := &Store{
		driver:  d,
		prefix:  prefix,
		o:       o,
		log:     o.Logger,
		reads:   make(chan struct{}, o.MaxReads),
		buffers: semaphore.NewWeighted(o.MaxBufferBytes),
		closing: make(chan struct{}),
	}
	var err error
	if s.metrics, err = newMetrics(o.Registerer, d.Kind); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	if err := s.try(ctx, "check", d.Check); err != nil {
		s.metrics.unregister()
		return nil, errors.Join(fmt.Errorf("%s: look at the bucket: %w", d.Kind, err), d.Close())
	}
	s.touches = newTouches(ctx, s)
	return s, nil
}

// Close writes the last uses that wait to be written, for some seconds at most,
// and frees the connections. Calls that are under way should have ended. Closing
// again does nothing.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		close(s.closing)
		s.touches.close()
		s.metrics.unregister()
		s.closeErr = s.driver.Close()
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

// KeepsContainers implements blob.ContainerStore.
func (s *Store) KeepsContainers() bool { return s.o.Containers }

// limit is how many bytes are kept under d at most.
func (s *Store) limit(d digest.Digest) int64 {
	if s.o.Containers {
		return blob.MaxContainer(d.Size())
	}
	return d.Size()
}

// fits reports whether an object of size bytes can be d.
func (s *Store) fits(size int64, d digest.Digest) bool {
	return size == d.Size() || s.o.Containers && size <= s.limit(d)
}

// usable reports whether an object is the blob d, and stays for the minimal
// lifetime even if no touch succeeds. If so, its lifetime begins anew.
func (s *Store) usable(st Stat, d digest.Digest) bool {
	switch age := time.Since(st.Used); {
	case !st.Exists:
		return false
	case !s.fits(st.SizeBytes, d):
		s.log.Error("object has the wrong size, and is taken as missing", "object", st.Name, "size_bytes", st.SizeBytes)
		return false
	case st.Used.IsZero():
		// No rule counts the days of an object without a time.
		s.touches.add(st.Object)
		return true
	case age >= s.o.ExpireAfter-s.o.margin():
		s.metrics.expiring.Inc()
		return false
	case age >= s.o.TouchEvery:
		s.touches.add(st.Object)
		return true
	}
	s.touches.fresh(st.Name)
	return true
}
