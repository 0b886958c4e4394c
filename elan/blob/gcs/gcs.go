// Package gcs is a blob.Store, with the entries of an ActionCache, in a bucket
// of Google Cloud Storage. Several servers may share a bucket.
//
// What it does is that of elan/blob/bucket; here are the requests, over
// cloud.google.com/go/storage and its JSON API. A blob's last use is its
// CustomTime, and the bucket's own rule deletes what was not used for
// Options.ExpireAfter: deploy/gcs-lifecycle.json. README.md in this folder tells
// the layout, the crash story and the requests that each call makes.
//
// It does not make buckets, keeps nothing on disk, remembers no presence and
// does not verify what it is given (blob.Receive does). elan/blob/open makes it
// for URLs of the form
//
//	gs://BUCKET/PREFIX?expire_after=720h&touch_every=24h&max_requests=64
//
// in which all after BUCKET may be left out. Credentials are the application's
// default ones. STORAGE_EMULATOR_HOST names another server, without credentials.
package gcs

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"cloud.google.com/go/storage"
	"google.golang.org/api/iterator"
	"google.golang.org/api/option"
	htransport "google.golang.org/api/transport/http"

	"github.com/mettle-build/mettle/elan/blob/bucket"
)

const (
	// batchSize is the most that Google takes in a batch request.
	batchSize = 100
	// maxBytes is the size of the largest object.
	maxBytes = 5 << 40
	// touchEvery is a day: a touch costs as much as a write, and the rule of
	// the bucket counts in days.
	touchEvery = 24 * time.Hour
)

// Options are the manual of a Store. Bucket alone is required.
type Options struct {
	// Bucket is the name of a bucket that there is.
	Bucket string
	// Prefix begins the names of all objects of the store. A rule of the bucket
	// can be for one prefix alone. "": none.
	Prefix string
	// Options are the bounds and lifetimes. TouchEvery 0 is a day.
	bucket.Options
}

// ParseURL reads the Options that a URL of the package comment's form says.
func ParseURL(u *url.URL) (Options, error) {
	o := Options{Bucket: u.Host, Prefix: u.Path}
	rest, err := bucket.ParseQuery(u, &o.Options)
	for name := range rest {
		err = fmt.Errorf("option %s is unknown", name)
	}
	return o, err
}

// New opens the store. It asks the bucket for its first object, to see that it
// is there and may be read; for which, as for being told that an object is not
// there, the role storage.objectUser is needed. The caller closes the Store. The
// context bounds New only.
func New(ctx context.Context, o Options) (*bucket.Store, error) {
	prefix, err := bucket.CleanPrefix(o.Prefix)
	switch {
	case err != nil:
	case o.Bucket == "" || strings.Contains(o.Bucket, "/"):
		err = fmt.Errorf("%q is not the name of a bucket", o.Bucket)
	default:
		err = o.Complete(touchEvery)
	}
	if err != nil {
		return nil, fmt.Errorf("gcs store: %w", err)
	}
	d, err := newObjects(ctx, o, prefix)
	if err != nil {
		return nil, fmt.Errorf("gcs store %s: %w", o.Bucket, err)
	}
	s, err := bucket.New(ctx, bucket.Driver{Objects: d, Kind: "gcs", BatchSize: batchSize, MaxBytes: maxBytes}, prefix, o.Options)
	if err != nil {
		return nil, fmt.Errorf("gcs store %s: %w", o.Bucket, err)
	}
	return s, nil
}

// objects implements bucket.Objects.
type objects struct {
	bucket, prefix string
	chunk          int
	retry          bucket.Retry
	http           *http.Client // authorized, for what the library has no call for
	transport      *http.Transport
	endpoint       string // scheme and host
	client         *storage.Client
	handle         *storage.BucketHandle
}

var _ bucket.Objects = (*objects)(nil)

func newObjects(ctx context.Context, o Options, prefix string) (*objects, error) {
	d := &objects{
		bucket: o.Bucket, prefix: prefix, chunk: o.ChunkBytes, retry: o.Retry(),
		transport: bucket.NewTransport(o.MaxRequests),
	}
	opts := []option.ClientOption{option.WithUserAgent("elan"), option.WithTelemetryDisabled()}
	emulator := os.Getenv("STORAGE_EMULATOR_HOST")
	if emulator == "" {
		d.endpoint = "https://storage.googleapis.com"
		opts = append(opts, option.WithScopes(storage.ScopeReadWrite))
	} else {
		d.endpoint = strings.TrimSuffix(emulator, "/")
		if !strings.Contains(emulator, "://") {
			d.endpoint = "http://" + d.endpoint
		}
		opts = append(opts, option.WithoutAuthentication())
	}
	// The credentials outlive New.
	ctx = context.WithoutCancel(ctx)
	authorized, err := htransport.NewTransport(ctx, d.transport, opts...)
	if err != nil {
		return nil, err
	}
	d.http = &http.Client{Transport: once{bucket.Limit(authorized, o.MaxRequests)}}
	d.client, err = storage.NewClient(ctx, option.WithHTTPClient(d.http), storage.WithJSONReads())
	if err != nil {
		return nil, err
	}
	// Attempts are counted in elan/blob/bucket.
	d.client.SetRetry(storage.WithPolicy(storage.RetryNever))
	d.handle = d.client.Bucket(o.Bucket)
	return d, nil
}

// Check implements bucket.Objects: one list of one object.
func (d *objects) Check(ctx context.Context) error {
	query := &storage.Query{Prefix: d.prefix, Projection: storage.ProjectionNoACL}
	if err := query.SetAttrSelection([]string{"Name"}); err != nil {
		return err
	}
	it := d.handle.Objects(ctx, query)
	it.PageInfo().MaxSize = 1
	_, err := it.Next()
	if errors.Is(err, iterator.Done) {
		return nil
	}
	if errors.Is(err, storage.ErrBucketNotExist) {
		return errors.New("there is no such bucket")
	}
	return classify(err)
}

// Close implements bucket.Objects.
func (d *objects) Close() error {
	err := d.client.Close()
	d.transport.CloseIdleConnections()
	return err
}
