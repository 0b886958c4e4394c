package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"

	"github.com/mettle-build/mettle/elan/blob/bucket"
)

// abortTimeout bounds the request that gives an upload up, for which nobody waits
// any more.
const abortTimeout = 10 * time.Second

//nolint:gochecknoglobals // an immutable table
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Upload implements bucket.ObjectWriter: a multipart upload, a request to begin,
// one for each part and one to end. Each is tried again by itself. The condition
// holds when it ends.
func (d *objects) Upload(ctx context.Context, name string, sizeBytes int64, c bucket.Condition) (bucket.Upload, error) {
	var out *s3.CreateMultipartUploadOutput
	err := d.retry.Do(ctx, func(ctx context.Context) (err error) {
		out, err = d.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{
			Bucket: &d.bucket, Key: &name,
			ChecksumAlgorithm: types.ChecksumAlgorithmCrc32c, ChecksumType: types.ChecksumTypeFullObject,
		})
		return classify(err)
	})
	if err != nil {
		return nil, err
	}
	u := &upload{d: d, name: name, id: out.UploadId, size: sizeBytes, condition: c}
	u.part = make([]byte, 0, d.chunk)
	u.send = func() error { return u.sendPart(ctx) }
	u.complete = func() error { return u.completeAll(ctx) }
	u.abort = func() error {
		// What ended the upload does not end this.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTimeout)
		defer cancel()
		_, err := d.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: &d.bucket, Key: &name, UploadId: u.id})
		return classify(err)
	}
	return u, nil
}

// upload implements bucket.Upload.
type upload struct {
	d                     *objects
	name                  string
	id                    *string
	size                  int64 // what it has to be; negative: what was written
	written               int64
	condition             bucket.Condition
	part                  []byte // written and not yet sent
	parts                 []types.CompletedPart
	sum                   uint32 // CRC32C of all bytes that were sent
	ended                 bool
	send, complete, abort func() error // under the upload's context
}

func (u *upload) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		n := min(len(p), cap(u.part)-len(u.part))
		u.part = append(u.part, p[:n]...)
		p = p[n:]
		if len(u.part) < cap(u.part) {
			break
		}
		if err := u.send(); err != nil {
			return total - len(p), err
		}
	}
	return total, nil
}

func (u *upload) sendPart(ctx context.Context) error {
	number := aws.Int32(int32(len(u.parts) + 1)) //nolint:gosec // at most maxParts
	sum := encodeCRC32C(bucket.CRC32C(u.part))
	err := u.d.retry.Do(ctx, func(ctx context.Context) error {
		out, err := u.d.client.UploadPart(ctx, &s3.UploadPartInput{
			Bucket: &u.d.bucket, Key: &u.name, UploadId: u.id, PartNumber: number,
			Body: bytes.NewReader(u.part), ContentLength: aws.Int64(int64(len(u.part))), ChecksumCRC32C: sum,
		})
		if err == nil {
			u.parts = append(u.parts, types.CompletedPart{ETag: out.ETag, PartNumber: number, ChecksumCRC32C: sum})
		}
		return classify(err)
	})
	u.sum = crc32.Update(u.sum, castagnoli, u.part)
	u.written += int64(len(u.part))
	u.part = u.part[:0]
	return err
}

func (u *upload) Commit() error {
	if len(u.part) > 0 {
		if err := u.send(); err != nil {
			return err
		}
	}
	if u.size < 0 {
		u.size = u.written
	}
	return u.complete()
}

func (u *upload) completeAll(ctx context.Context) error {
	ifNone, ifMatch := headers(u.condition)
	err := u.d.retry.Do(ctx, func(ctx context.Context) error {
		_, err := u.d.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{
			Bucket: &u.d.bucket, Key: &u.name, UploadId: u.id,
			MultipartUpload: &types.CompletedMultipartUpload{Parts: u.parts},
			ChecksumCRC32C:  encodeCRC32C(u.sum), ChecksumType: types.ChecksumTypeFullObject, MpuObjectSize: &u.size,
			IfNoneMatch: ifNone, IfMatch: ifMatch,
		})
		var api smithy.APIError
		if errors.As(err, &api) && api.ErrorCode() == "NoSuchUpload" {
			// An attempt whose answer was lost may have ended it.
			return fmt.Errorf("%w: %w", bucket.ErrChanged, err)
		}
		return classifyWrite(err, u.condition)
	})
	u.ended = err == nil
	return err
}

// Abort implements bucket.Upload. The parts of an upload that could not be
// aborted are the lifecycle rule's.
func (u *upload) Abort() error {
	u.part = nil
	if u.ended {
		return nil
	}
	u.ended = true
	return u.abort()
}
