package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
)

// Open implements blob.Opener, by ByteStream.Read. It returns when the first
// bytes are here. Closing the reader early ends the call.
func (c *Client) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if err := checkDigest(d); err != nil {
		return nil, fmt.Errorf("open blob: %w", err)
	}
	if offset < 0 || offset > d.Size() {
		return nil, fmt.Errorf("open blob %s: offset %d is outside 0 to %d", d, offset, d.Size())
	}
	if d.IsEmpty() {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	ctx, cancel := context.WithCancel(ctx)
	due := d.Size() - offset
	name := resource.Name{Instance: c.o.Instance, Digest: d, Compressor: c.compressor(ctx, due)}
	stream, err := c.streams.Read(ctx, &bytestream.ReadRequest{ResourceName: name.String(), ReadOffset: offset})
	if err != nil {
		cancel()
		return nil, fmt.Errorf("open blob %s: %w", d, fromStatus(err))
	}
	if name.Compressor != repb.Compressor_IDENTITY {
		r, err := c.openCompressed(&messages{stream: stream, digest: d}, cancel, due)
		if err != nil {
			cancel()
		}
		return r, err
	}
	r := &reader{stream: stream, cancel: cancel, digest: d, due: due}
	// That a blob is not there is known only by the first answer.
	if err := r.fill(); err != nil && !errors.Is(err, io.EOF) {
		cancel()
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	return r, nil
}

// reader reads a blob from a stream.
type reader struct {
	stream bytestream.ByteStream_ReadClient
	cancel context.CancelFunc
	digest digest.Digest
	due    int64  // bytes that are not yet in data
	data   []byte // received and not yet read
	err    error
}

// fill receives until there is data, or an error, which is io.EOF at the end.
func (r *reader) fill() error {
	for len(r.data) == 0 && r.err == nil {
		msg, err := r.stream.Recv()
		switch {
		case errors.Is(err, io.EOF) && r.due == 0:
			r.err = io.EOF
		case errors.Is(err, io.EOF):
			r.err = fmt.Errorf("read blob %s: %w: the server's copy ends %d bytes early", r.digest, blob.ErrCorrupt, r.due)
		case err != nil:
			r.err = fmt.Errorf("read blob %s: %w", r.digest, fromStatus(err))
		case int64(len(msg.Data)) > r.due:
			r.err = fmt.Errorf("read blob %s: %w: the server sends more than its %d bytes", r.digest, blob.ErrCorrupt, r.digest.Size())
		default:
			r.due -= int64(len(msg.Data))
			r.data = msg.Data
		}
	}
	if len(r.data) > 0 {
		return nil
	}
	return r.err
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.fill(); err != nil {
		return 0, err
	}
	n := copy(p, r.data)
	r.data = r.data[n:]
	return n, nil
}

// WriteTo implements io.WriterTo, which saves a copy.
func (r *reader) WriteTo(w io.Writer) (total int64, err error) {
	for {
		if err := r.fill(); err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return total, err
		}
		n, err := w.Write(r.data)
		total += int64(n)
		r.data = r.data[n:]
		if err != nil {
			return total, err //nolint:wrapcheck // the writer's own
		}
	}
}

// Close implements io.Closer.
func (r *reader) Close() error {
	r.cancel()
	r.data = nil
	if r.err == nil {
		r.err = fmt.Errorf("read blob %s: %w", r.digest, io.ErrClosedPipe)
	}
	return nil
}
