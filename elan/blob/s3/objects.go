package s3

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/bucket"
)

// status is the HTTP status of an answer that is an error. 0: there was none.
func status(err error) int {
	if answer, ok := errors.AsType[*awshttp.ResponseError](err); ok {
		return answer.HTTPStatusCode()
	}
	return 0
}

// classify puts an error of the SDK into a class of elan/blob/bucket. S3's codes
// come first, where there is one; a HEAD's answer has only its status.
func classify(err error) error {
	if err == nil {
		return nil
	}
	wrap := func(class error) error { return fmt.Errorf("%w: %w", class, err) }
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		switch api.ErrorCode() {
		case "NoSuchBucket":
			return err // says nothing of the object
		case "NoSuchKey":
			return wrap(blob.ErrNotFound)
		case "NoSuchUpload", "InvalidPart":
			return err
		case "QuotaExceeded", "InsufficientCapacity", "XMinioStorageFull":
			return wrap(blob.ErrFull)
		case "BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "IncompleteBody",
			"RequestTimeout", "RequestTimeTooSkewed", "SlowDown", "Throttling", "ThrottlingException":
			return wrap(bucket.ErrTransient) // damaged or lost on the way, or too much at once
		}
	}
	switch code := status(err); {
	case code == http.StatusNotFound:
		return wrap(blob.ErrNotFound)
	case code == http.StatusPreconditionFailed:
		return wrap(bucket.ErrChanged)
	case code == http.StatusRequestedRangeNotSatisfiable:
		return wrap(bucket.ErrRange)
	case code == http.StatusInsufficientStorage:
		return wrap(blob.ErrFull)
	// 409 is a conflict with another conditional write that is under way.
	case code == 0, code == http.StatusRequestTimeout, code == http.StatusConflict, code == http.StatusTooManyRequests,
		code >= http.StatusInternalServerError:
		return wrap(bucket.ErrTransient)
	}
	return err
}

// classifyWrite is classify for a write under a condition: an object of a
// certain version that is gone has changed.
func classifyWrite(err error, c bucket.Condition) error {
	err = classify(err)
	if c.Version != "" && errors.Is(err, blob.ErrNotFound) {
		return fmt.Errorf("%w: it is gone", bucket.ErrChanged)
	}
	return err
}

// Stat implements bucket.ObjectReader: a HEAD of the one name.
func (d *objects) Stat(ctx context.Context, names []string) []bucket.Stat {
	stats := make([]bucket.Stat, len(names))
	for i, name := range names {
		stats[i] = bucket.Stat{Object: bucket.Object{Name: name}}
		out, err := d.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &d.bucket, Key: &name})
		switch err := classify(err); {
		case err == nil:
			stats[i].Exists, stats[i].Used = true, aws.ToTime(out.LastModified)
			stats[i].SizeBytes, stats[i].Version = aws.ToInt64(out.ContentLength), aws.ToString(out.ETag)
		case !errors.Is(err, blob.ErrNotFound):
			stats[i].Err = err
		}
	}
	return stats
}

// Get implements bucket.ObjectReader: one GET.
func (d *objects) Get(ctx context.Context, name string, offset int64) (io.ReadCloser, bucket.Object, error) {
	in := &s3.GetObjectInput{Bucket: &d.bucket, Key: &name, ChecksumMode: types.ChecksumModeEnabled}
	if offset > 0 {
		in.Range = aws.String("bytes=" + strconv.FormatInt(offset, 10) + "-")
	}
	out, err := d.client.GetObject(ctx, in)
	if err != nil {
		return nil, bucket.Object{}, classify(err)
	}
	o := bucket.Object{Name: name, SizeBytes: aws.ToInt64(out.ContentLength), Used: aws.ToTime(out.LastModified), Version: aws.ToString(out.ETag)}
	if offset > 0 {
		if o.SizeBytes, err = totalOf(aws.ToString(out.ContentRange), offset); err != nil {
			_ = out.Body.Close()
			return nil, bucket.Object{}, err
		}
	}
	if out.ChecksumType != types.ChecksumTypeComposite { // a checksum of the parts'
		o.CRC32C = decodeCRC32C(out.ChecksumCRC32C)
	}
	return out.Body, o, nil
}

// List implements bucket.ObjectReader: one GET of the bucket, for up to 1,000.
func (d *objects) List(ctx context.Context, prefix, token string) ([]bucket.Object, string, error) {
	in := &s3.ListObjectsV2Input{Bucket: &d.bucket, Prefix: &prefix}
	if token != "" {
		in.ContinuationToken = &token
	}
	out, err := d.client.ListObjectsV2(ctx, in)
	if err != nil {
		return nil, "", classify(err)
	}
	os := make([]bucket.Object, len(out.Contents))
	for i, c := range out.Contents {
		os[i] = bucket.Object{
			Name: aws.ToString(c.Key), SizeBytes: aws.ToInt64(c.Size),
			Used: aws.ToTime(c.LastModified), Version: aws.ToString(c.ETag),
		}
	}
	if !aws.ToBool(out.IsTruncated) {
		return os, "", nil
	}
	return os, aws.ToString(out.NextContinuationToken), nil
}

// totalOf reads the size of the object in the Content-Range of an answer that
// begins at offset.
func totalOf(contentRange string, offset int64) (int64, error) {
	rest, ok := strings.CutPrefix(contentRange, fmt.Sprintf("bytes %d-", offset))
	_, total, found := strings.Cut(rest, "/")
	size, err := strconv.ParseInt(total, 10, 64)
	if !ok || !found || err != nil || size < 0 {
		return 0, fmt.Errorf("the bytes from %d were asked for, the answer has the range %.100q", offset, contentRange)
	}
	return size, nil
}

func encodeCRC32C(sum uint32) *string {
	s := base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, sum))
	return &s
}

func decodeCRC32C(s *string) *uint32 {
	raw, err := base64.StdEncoding.DecodeString(aws.ToString(s))
	if err != nil || len(raw) != 4 {
		return nil
	}
	sum := binary.BigEndian.Uint32(raw)
	return &sum
}

// Put implements bucket.ObjectWriter: one PUT, with the CRC32C in front, which
// the server holds the bytes against.
func (d *objects) Put(ctx context.Context, name string, data []byte, c bucket.Condition) error {
	ifNone, ifMatch := headers(c)
	_, err := d.client.PutObject(ctx, &s3.PutObjectInput{
		Bucket: &d.bucket, Key: &name,
		Body: bytes.NewReader(data), ContentLength: aws.Int64(int64(len(data))),
		ChecksumCRC32C: encodeCRC32C(bucket.CRC32C(data)),
		IfNoneMatch:    ifNone, IfMatch: ifMatch,
	})
	return classifyWrite(err, c)
}

// headers are If-None-Match and If-Match.
func headers(c bucket.Condition) (ifNone, ifMatch *string) {
	switch {
	case c.Absent:
		return aws.String("*"), nil
	case c.Version != "":
		return nil, &c.Version
	}
	return nil, nil
}

// Touch implements bucket.ObjectWriter: a copy of the one object onto itself,
// which S3 allows where it changes something, and we say the metadata does.
func (d *objects) Touch(ctx context.Context, os []bucket.Object) []error {
	errs := make([]error, len(os))
	for i, o := range os {
		if o.SizeBytes > maxCopyBytes {
			continue
		}
		_, err := d.client.CopyObject(ctx, &s3.CopyObjectInput{
			Bucket: &d.bucket, Key: &o.Name,
			CopySource:        aws.String(url.PathEscape(d.bucket) + "/" + escapePath(o.Name)),
			MetadataDirective: types.MetadataDirectiveReplace,
			// An entry that was replaced meanwhile is not put back.
			CopySourceIfMatch: &o.Version,
			IfMatch:           &o.Version,
		})
		errs[i] = classify(err)
	}
	return errs
}

// escapePath escapes the parts of an object's name, and leaves the slashes.
func escapePath(name string) string {
	parts := strings.Split(name, "/")
	for i := range parts {
		parts[i] = url.PathEscape(parts[i])
	}
	return strings.Join(parts, "/")
}

// Delete implements bucket.ObjectWriter.
func (d *objects) Delete(ctx context.Context, name string) error {
	_, err := d.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &d.bucket, Key: &name})
	return classify(err)
}
