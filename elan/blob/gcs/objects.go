package gcs

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"cloud.google.com/go/storage"
	"github.com/googleapis/gax-go/v2"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/iterator"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/bucket"
)

//nolint:gochecknoglobals // an immutable table
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

const (
	contentType = "application/octet-stream" // not to be guessed from the bytes
	maxBackoff  = 8 * time.Second
)

// classify puts an error of the library into a class of elan/blob/bucket.
func classify(err error) error {
	if err == nil {
		return nil
	}
	var answer *googleapi.Error
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.As(err, &answer) && answer.Code == http.StatusNotFound && aboutBucket(answer.Body+answer.Message):
		return errors.New(answer.Error()) // without the library's class, which is that of the object
	case errors.Is(err, storage.ErrObjectNotExist):
		return fmt.Errorf("%w: %w", blob.ErrNotFound, err)
	case errors.As(err, &answer):
		return classifyCode(answer.Code, err)
	}
	return fmt.Errorf("%w: %w", bucket.ErrTransient, err) // trouble on the way
}

// classifyCode puts an answer with an HTTP status into a class. Those to be tried
// again are Google's: 408, 429 and all from 500 on.
func classifyCode(code int, err error) error {
	switch {
	case code == http.StatusNotFound:
		return fmt.Errorf("%w: %w", blob.ErrNotFound, err)
	case code == http.StatusPreconditionFailed:
		return fmt.Errorf("%w: %w", bucket.ErrChanged, err)
	case code == http.StatusRequestedRangeNotSatisfiable:
		return fmt.Errorf("%w: %w", bucket.ErrRange, err)
	case code == http.StatusRequestTimeout, code == http.StatusTooManyRequests, code >= http.StatusInternalServerError:
		return fmt.Errorf("%w: %w", bucket.ErrTransient, err)
	}
	return err
}

// Get implements bucket.ObjectReader: one request. That an object is not there
// is taken from an answer that does not speak of the bucket.
func (d *objects) Get(ctx context.Context, name string, offset int64) (io.ReadCloser, bucket.Object, error) {
	// Its own checksum would go unseen by callers who stop at the last byte.
	r, err := d.handle.Object(name).NewRangeReader(withOnce(ctx), offset, -1, storage.WithDisableReaderChecksum())
	if err != nil {
		return nil, bucket.Object{}, classify(err)
	}
	o := bucket.Object{Name: name, SizeBytes: r.Attrs.Size, Version: strconv.FormatInt(r.Attrs.Generation, 10)}
	if r.Attrs.CRC32C != 0 { // 0 is also what stands for an answer without it
		o.CRC32C = &r.Attrs.CRC32C
	}
	return r, o, nil
}

// listSize is the most that Google lists in a request.
const listSize = 1000

// List implements bucket.ObjectReader: one request.
func (d *objects) List(ctx context.Context, prefix, token string) ([]bucket.Object, string, error) {
	query := &storage.Query{Prefix: prefix, Projection: storage.ProjectionNoACL}
	if err := query.SetAttrSelection([]string{"Name", "Size", "CustomTime", "Generation", "Metageneration"}); err != nil {
		return nil, "", err
	}
	var page []*storage.ObjectAttrs
	next, err := iterator.NewPager(d.handle.Objects(withOnce(ctx), query), listSize, token).NextPage(&page)
	if err != nil {
		return nil, "", classify(err)
	}
	os := make([]bucket.Object, len(page))
	for i, a := range page {
		os[i] = bucket.Object{
			Name: a.Name, SizeBytes: a.Size, Used: a.CustomTime,
			Version: fmt.Sprintf("%d.%d", a.Generation, a.Metageneration),
		}
	}
	return os, next, nil
}

// Put implements bucket.ObjectWriter: one multipart upload, with the CRC32C in
// front, which the server holds the bytes against.
func (d *objects) Put(ctx context.Context, name string, data []byte, c bucket.Condition) error {
	o, err := d.object(name, c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := o.NewWriter(ctx)
	w.ChunkSize = 0 // no buffer: data is one
	w.ContentType = contentType
	w.CustomTime = time.Now()
	w.CRC32C, w.SendCRC32C = bucket.CRC32C(data), true
	_, err = w.Write(data)
	if closeErr := w.Close(); closeErr != nil {
		err = closeErr // which has the answer
	}
	return classifyUpload(err)
}

// classifyUpload is classify for uploads, of which only the bytes can be wrong,
// and only because they were damaged on the way.
func classifyUpload(err error) error {
	var answer *googleapi.Error
	if errors.As(err, &answer) && answer.Code == http.StatusBadRequest {
		return fmt.Errorf("%w: %w", bucket.ErrTransient, err)
	}
	return classify(err)
}

// object is the handle for writing under a condition.
func (d *objects) object(name string, c bucket.Condition) (*storage.ObjectHandle, error) {
	o := d.handle.Object(name)
	switch {
	case c.Absent:
		o = o.If(storage.Conditions{DoesNotExist: true})
	case c.Version != "":
		generation, _, err := parseVersion(c.Version)
		if err != nil {
			return nil, err
		}
		o = o.If(storage.Conditions{GenerationMatch: generation})
	}
	return o, nil
}

// backoff is that of elan/blob/bucket.
func (d *objects) backoff() gax.Backoff {
	return gax.Backoff{Initial: d.retry.Backoff, Max: maxBackoff, Multiplier: 2}
}

// chunkDeadline is how long a chunk is tried again: the library counts the time
// and not the attempts. It is that of one attempt, and of all the waits.
func (d *objects) chunkDeadline() time.Duration {
	total := d.retry.Timeout
	for i := range d.retry.Attempts - 1 {
		total += min(d.retry.Backoff<<min(i, 20), maxBackoff)
	}
	return total
}

// parseVersion reads a version: the generation, a dot, and the metageneration,
// which is there only where an object was looked at.
func parseVersion(version string) (generation int64, meta string, err error) {
	first, meta, _ := strings.Cut(version, ".")
	generation, err = strconv.ParseInt(first, 10, 64)
	return generation, meta, err
}

// Upload implements bucket.ObjectWriter: a resumable upload, a request to begin
// and one for each chunk. The library tries them again with the same backoff, and
// sends the CRC32C of all bytes with the last. The answer's is held against them
// once more, for servers that do not look.
func (d *objects) Upload(ctx context.Context, name string, sizeBytes int64, c bucket.Condition) (bucket.Upload, error) {
	o, err := d.object(name, c)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	w := o.Retryer(storage.WithPolicy(storage.RetryIdempotent), storage.WithBackoff(d.backoff())).NewWriter(ctx)
	w.ChunkSize = d.chunk
	w.ChunkRetryDeadline = d.chunkDeadline()
	w.ChunkTransferTimeout = d.retry.Timeout
	w.ContentType = contentType
	w.CustomTime = time.Now()
	u := &upload{w: w, cancel: cancel, size: sizeBytes}
	u.withdraw = func(generation int64) error {
		return d.handle.Object(name).If(storage.Conditions{GenerationMatch: generation}).Delete(ctx)
	}
	return u, nil
}

// upload implements bucket.Upload.
type upload struct {
	w        *storage.Writer
	cancel   context.CancelFunc
	size     int64 // what it has to be; negative: what was written
	written  int64
	sum      uint32                       // CRC32C of what was written
	withdraw func(generation int64) error // deletes what was written, under the upload's context
	ended    bool
}

func (u *upload) Write(p []byte) (int, error) {
	n, err := u.w.Write(p)
	u.sum = crc32.Update(u.sum, castagnoli, p[:n])
	u.written += int64(n)
	return n, classifyUpload(err)
}

func (u *upload) Commit() error {
	defer u.end()
	if err := u.w.Close(); err != nil {
		return classifyUpload(err)
	}
	if u.size < 0 {
		u.size = u.written
	}
	if has := u.w.Attrs(); has.Size != u.size || has.CRC32C != u.sum {
		err := fmt.Errorf("the bucket has %d bytes with the CRC32C %08x, of %d with %08x that were written", has.Size, has.CRC32C, u.size, u.sum)
		return errors.Join(err, u.withdraw(has.Generation))
	}
	return nil
}

// Abort gives the upload up. What Google has of it is gone within a week.
func (u *upload) Abort() error {
	if u.ended {
		return nil
	}
	u.cancel()
	// The library would take a mere Close for the end of the blob.
	_ = u.w.CloseWithError(context.Canceled) //nolint:staticcheck // it is what keeps Close from ending the upload whole
	_ = u.w.Close()                          // waits until the request has ended; its error is ours
	u.end()
	return nil
}

func (u *upload) end() {
	u.ended = true
	u.cancel()
}

// Delete implements bucket.ObjectWriter.
func (d *objects) Delete(ctx context.Context, name string) error {
	return classify(d.handle.Object(name).Delete(ctx))
}
