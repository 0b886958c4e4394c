// Package asset is the Remote Asset API without its wire: it maps a URI and
// qualifiers to blobs and directories in the CAS, fetching what it does not have.
//
// Files come over http and https, directories out of archives that do, and out
// of git repositories by the system's git. What was fetched or pushed is kept as
// an entry beside the action results, survives restarts, and is served only while
// everything that it refers to is in the store, whose lifetime starts anew then.
//
// Whoever may call this makes the server open connections. Connections go
// to public addresses alone, unless networks are allowed by name: that is checked
// for each address that is dialled, so that neither a redirect nor a DNS answer
// leads inside (see Guard); git runs behind a proxy of ours with the same check.
// No proxy of the environment is used. elan/rpc serves this package; it knows no
// gRPC itself, and elan/rpc alone makes statuses.
package asset

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// The defaults of Options.
const (
	// DefaultMaxBytes holds the largest toolchains and disk images.
	DefaultMaxBytes = 16 << 30
	// DefaultTimeout is for what comes over slow lines too. Clients wait as long as
	// they like, and find later what was fetched after they had gone.
	DefaultTimeout = 30 * time.Minute
	// defaultMaxFetches is how many downloads keep a line busy.
	defaultMaxFetches = 16
	// maxFlights bounds the fetches that wait for their turn.
	maxFlights = 1024
	// defaultConnectTimeout and defaultIdleTimeout find origins that are gone, so
	// that the next mirror has its turn.
	defaultConnectTimeout = 15 * time.Second
	defaultIdleTimeout    = 60 * time.Second
	defaultRetryDelay     = 500 * time.Millisecond
)

// Options are those of New.
type Options struct {
	// Store is where fetched blobs go. If it is a blob.Adopter, large files go
	// into it without a copy.
	Store blob.Store
	// Stores gives the blobs of an instance, where each has its own: see
	// elan/blob/instances. nil: Store, for all of them.
	Stores func(instance string) blob.Store
	// Entries keeps what is known of assets.
	Entries blob.Entries
	// Dir is a directory for what is being fetched, of this Service alone: New
	// empties it. On the file system of the store, large files need no copy. Empty:
	// a temporary directory, once there is need for one, that Close removes.
	Dir string
	// MaxBytes bounds one asset: a file, an archive, the contents of an archive, or
	// what git transfers and what it holds. 0: DefaultMaxBytes.
	MaxBytes int64
	// Timeout bounds one fetch, whatever its request says. 0: DefaultTimeout.
	Timeout time.Duration
	// MaxFetches is how many assets are fetched at once; others wait. 0: 16.
	MaxFetches int
	// AllowPrivate are networks that may be fetched from although they are not public.
	AllowPrivate []netip.Prefix
	// ConnectTimeout bounds a connection's making, 0: 15 s. IdleTimeout bounds the
	// wait for the next bytes of an answer, 0: 60 s. RetryDelay is the pause before
	// the second attempt, the third's is twice as long, 0: 0.5 s.
	ConnectTimeout, IdleTimeout, RetryDelay time.Duration
	// MinLifetime is for how long the store keeps what was used, which clients are
	// told; 0: they are told nothing.
	MinLifetime time.Duration
	// Logger gets what clients can't be told; nil discards it.
	Logger *slog.Logger
	// Registerer gets the metrics; nil means none.
	Registerer prometheus.Registerer
}

// withDefaults checks o and fills it in.
func (o Options) withDefaults() (Options, error) {
	if o.Store == nil || o.Entries == nil {
		return o, errors.New("assets: Options need a Store and Entries")
	}
	if o.MaxBytes < 0 || o.Timeout < 0 || o.MaxFetches < 0 || o.ConnectTimeout < 0 || o.IdleTimeout < 0 || o.RetryDelay < 0 {
		return o, errors.New("assets: limits and timeouts may not be negative")
	}
	if o.Stores == nil {
		shared := o.Store
		o.Stores = func(string) blob.Store { return shared }
	}
	o.Store = nil // from here on, every call asks for its instance's
	for _, d := range []struct {
		value *time.Duration
		or    time.Duration
	}{
		{&o.Timeout, DefaultTimeout},
		{&o.ConnectTimeout, defaultConnectTimeout},
		{&o.IdleTimeout, defaultIdleTimeout},
		{&o.RetryDelay, defaultRetryDelay},
	} {
		if *d.value == 0 {
			*d.value = d.or
		}
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = DefaultMaxBytes
	}
	if o.MaxFetches == 0 {
		o.MaxFetches = defaultMaxFetches
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// Service fetches, remembers and takes in assets. It is safe for concurrent use.
type Service struct {
	o       Options
	guard   *Guard
	http    *httpFetcher
	git     *gitFetcher
	metrics *metrics
	dir     *scratch

	slots   chan struct{}  // holds a value for each fetch that runs
	running sync.WaitGroup // the goroutines of flights

	mu      sync.Mutex // guards what follows; nothing waits under it
	closed  bool
	flights map[flightID][]*flight // those that can be boarded
	aloft   map[*flight]struct{}   // those that have not ended
}

// New checks the options, empties Options.Dir and returns a Service, which the
// caller closes.
func New(o Options) (*Service, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Service{slots: make(chan struct{}, o.MaxFetches), flights: map[flightID][]*flight{}, aloft: map[*flight]struct{}{}}
	if s.dir, err = newScratch(o.Dir); err != nil {
		return nil, fmt.Errorf("assets: %w", err)
	}
	if s.metrics, err = newMetrics(o.Registerer, s); err != nil {
		return nil, fmt.Errorf("assets: %w", err)
	}
	s.o = o
	s.guard = NewGuard(o.AllowPrivate)
	s.http = newHTTPFetcher(o, s.guard)
	s.git = &gitFetcher{s: s, o: o, guard: s.guard}
	return s, nil
}

// Close cancels the fetches that run, waits for them, and frees what the Service
// holds. Calls after it fail with an error that wraps blob.ErrUnavailable.
func (s *Service) Close() error {
	s.mu.Lock()
	s.closed = true
	for f := range s.aloft {
		f.cancel(errClosed)
	}
	s.mu.Unlock()
	s.running.Wait()
	s.http.close()
	s.metrics.unregister()
	return s.dir.close()
}

// kind tells files from directories, which are different assets under the same
// URI and qualifiers.
type kind string

const (
	blobs       kind = "blob"
	directories kind = "directory"
)

// Qualifier says more closely what is meant by a URI.
type Qualifier struct{ Name, Value string }

// Request is what FetchBlob and FetchDirectory take.
type Request struct {
	Instance string
	// URIs are tried in their order. There must be at least one.
	URIs       []string
	Qualifiers []Qualifier
	// Function is that of the digest that is wanted; 0 means SHA256.
	Function digest.Function
	// Timeout bounds the fetch; 0, and what is longer than that of the Options,
	// mean the latter.
	Timeout time.Duration
	// Oldest, if it is not zero, is the time since which the content must have been
	// fetched or pushed.
	Oldest time.Time
}

// Response is an asset that is in the store.
type Response struct {
	// Digest is that of the file, or of the root Directory.
	Digest digest.Digest
	// URI is that of the request's under which the asset was found. It is empty
	// where the checksum alone told which blob is meant.
	URI        string
	Qualifiers []Qualifier
	// ExpiresAt is until when the asset stays at least; zero if that is not known.
	ExpiresAt time.Time
}

// Push is what PushBlob and PushDirectory take.
type Push struct {
	Instance   string
	URIs       []string
	Qualifiers []Qualifier
	// Digest is that of the file, or of the root Directory.
	Digest digest.Digest
	// ExpireAt, if it is not zero, is when the asset stops being served.
	ExpireAt time.Time
	// Blobs and Directories are what the asset refers to, and is not served without.
	Blobs, Directories []digest.Digest
}

// FetchBlob returns the file that is meant, from the store or from one of the
// URIs. What origins are to blame for is a *FetchError. A malformed request wraps
// ErrInvalid, one with qualifiers that can't be heeded is an *UnsupportedError; the
// store's own errors come back wrapped. Where ctx is done first, so is the call; a
// fetch whose caller's deadline passed goes on, for the next caller.
func (s *Service) FetchBlob(ctx context.Context, r Request) (Response, error) {
	return s.fetch(ctx, blobs, r)
}

// FetchDirectory is FetchBlob for a directory: the Directories and files below
// the digest that it returns are in the store.
func (s *Service) FetchDirectory(ctx context.Context, r Request) (Response, error) {
	return s.fetch(ctx, directories, r)
}

// PushBlob remembers a file, which must be in the store, under each of the URIs.
// Where something is missing the error is a *blob.MissingError; a malformed
// request, and a checksum that is not the file's, wrap ErrInvalid.
func (s *Service) PushBlob(ctx context.Context, p Push) error { return s.push(ctx, blobs, p) }

// PushDirectory is PushBlob for a directory and all that is below it.
func (s *Service) PushDirectory(ctx context.Context, p Push) error {
	return s.push(ctx, directories, p)
}
