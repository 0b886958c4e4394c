// Package s3 is a blob.Store, with the entries of an ActionCache, in a bucket of
// Amazon S3, or of another server of its protocol that has conditional writes
// (If-None-Match). Several servers may share a bucket.
//
// What it does is that of elan/blob/bucket; here are the requests, over
// aws-sdk-go-v2. A blob's last use is its Last-Modified time, which a copy of the
// object onto itself makes new; and the bucket's own rule deletes what is older
// than Options.ExpireAfter: deploy/s3-lifecycle.json. README.md in this folder
// tells why copies and not tags, the layout, the crash story and the requests
// that each call makes.
//
// It does not make buckets, keeps nothing on disk, remembers no presence and
// does not verify what it is given (blob.Receive does). elan/blob/open makes it
// for URLs of the form
//
//	s3://BUCKET/PREFIX?region=eu-west-1&endpoint=http://localhost:9000&path_style=true&expire_after=720h
//
// in which all after BUCKET may be left out. Credentials, and what is left out,
// are those of the environment and of the AWS configuration files;
// AWS_ENDPOINT_URL names another server.
package s3

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go/logging"

	"github.com/mettle-build/mettle/elan/blob/bucket"
)

const (
	// maxParts and minPartBytes are S3's own. A blob has at most maxParts chunks:
	// 78 GiB of 8 MiB.
	maxParts     = 10_000
	minPartBytes = 5 << 20
	// maxCopyBytes is the size of the largest object that one request copies. A
	// larger one is never touched, and uploaded again once in ExpireAfter.
	maxCopyBytes = 5 << 30
	// touchShare is the part of ExpireAfter that a use goes unwritten for: a
	// week of 30 days. A copy costs twelve times as much as a look.
	touchShare = 4
)

// Options are the manual of a Store. Bucket alone is required.
type Options struct {
	// Bucket is the name of a bucket that there is.
	Bucket string
	// Prefix begins the names of all objects of the store. A rule of the bucket
	// can be for one prefix alone. "": none.
	Prefix string
	// Region is the bucket's. "": that of the AWS configuration, or us-east-1
	// where an endpoint is given.
	Region string
	// Endpoint is the URL of another server than Amazon's. "": that of the AWS
	// configuration (AWS_ENDPOINT_URL).
	Endpoint string
	// PathStyle is for servers that have the bucket in the path and not in the
	// host's name. It is so in any case where the endpoint is given here or by
	// AWS_ENDPOINT_URL.
	PathStyle bool
	// Options are the bounds and lifetimes. TouchEvery 0 is a quarter of
	// ExpireAfter; ChunkBytes has to be at least 5 MiB.
	bucket.Options

	anyChunk bool // tests write small parts, for speed
}

// ParseURL reads the Options that a URL of the package comment's form says.
func ParseURL(u *url.URL) (Options, error) {
	o := Options{Bucket: u.Host, Prefix: u.Path}
	rest, err := bucket.ParseQuery(u, &o.Options)
	for name, value := range rest {
		switch name {
		case "region":
			o.Region = value
		case "endpoint":
			o.Endpoint = value
		case "path_style":
			if o.PathStyle, err = strconv.ParseBool(value); err != nil {
				return o, fmt.Errorf("option %s: %w", name, err)
			}
		default:
			return o, fmt.Errorf("option %s is unknown", name)
		}
	}
	return o, err
}

// New opens the store. It asks whether the bucket is there and may be listed,
// which is also what makes S3 tell that an object is not there: the rights
// s3:ListBucket, GetObject, PutObject, DeleteObject and AbortMultipartUpload are
// needed. The caller closes the Store. The context bounds New only.
func New(ctx context.Context, o Options) (*bucket.Store, error) {
	prefix, err := bucket.CleanPrefix(o.Prefix)
	expire := o.ExpireAfter
	if expire == 0 {
		expire = bucket.DefaultExpireAfter
	}
	switch {
	case err != nil:
	case o.Bucket == "" || strings.Contains(o.Bucket, "/"):
		err = fmt.Errorf("%q is not the name of a bucket", o.Bucket)
	case o.ChunkBytes != 0 && o.ChunkBytes < minPartBytes && !o.anyChunk:
		err = fmt.Errorf("a chunk of %d bytes: S3 takes none under %d", o.ChunkBytes, minPartBytes)
	default:
		err = o.Complete(expire / touchShare)
	}
	if err != nil {
		return nil, fmt.Errorf("s3 store: %w", err)
	}
	d, err := newObjects(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("s3 store %s: %w", o.Bucket, err)
	}
	s, err := bucket.New(ctx, bucket.Driver{Objects: d, Kind: "s3", BatchSize: 1, MaxBytes: int64(o.ChunkBytes) * maxParts}, prefix, o.Options)
	if err != nil {
		return nil, fmt.Errorf("s3 store %s: %w", o.Bucket, err)
	}
	return s, nil
}

// objects implements bucket.Objects.
type objects struct {
	bucket    string
	chunk     int64
	retry     bucket.Retry
	transport *http.Transport
	client    *s3.Client
}

var _ bucket.Objects = (*objects)(nil)

func newObjects(ctx context.Context, o Options) (*objects, error) {
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return nil, err
	}
	transport := bucket.NewTransport(o.MaxRequests)
	if configured, ok := cfg.HTTPClient.(*awshttp.BuildableClient); ok {
		transport.TLSClientConfig = configured.GetTransport().TLSClientConfig // with AWS_CA_BUNDLE
	}
	client := s3.NewFromConfig(cfg, func(c *s3.Options) {
		c.HTTPClient = &http.Client{Transport: bucket.Limit(transport, o.MaxRequests)}
		c.Retryer = aws.NopRetryer{} // attempts are counted in elan/blob/bucket
		c.Logger = logging.Nop{}     // which would write to stderr
		if o.Region != "" {
			c.Region = o.Region
		}
		if o.Endpoint != "" {
			c.BaseEndpoint = aws.String(o.Endpoint)
		}
		if c.Region == "" && c.BaseEndpoint != nil {
			c.Region = "us-east-1" // what other servers call themselves
		}
		c.UsePathStyle = o.PathStyle || c.BaseEndpoint != nil
		// CRC32C goes with every upload and is asked for with every blob, by
		// what is written here; the SDK's own would come on top.
		c.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
		c.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
	})
	if client.Options().Region == "" {
		return nil, errors.New("no region: say ?region=REGION in the URL, or set AWS_REGION")
	}
	return &objects{bucket: o.Bucket, chunk: int64(o.ChunkBytes), retry: o.Retry(), transport: transport, client: client}, nil
}

// Check implements bucket.Objects: one HEAD of the bucket.
func (d *objects) Check(ctx context.Context) error {
	_, err := d.client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: &d.bucket})
	if status(err) == http.StatusNotFound {
		return fmt.Errorf("there is no such bucket: %w", err)
	}
	return classify(err)
}

// Close implements bucket.Objects.
func (d *objects) Close() error {
	d.transport.CloseIdleConnections()
	return nil
}
