package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/mem"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
	"github.com/mettle-build/mettle/elan/wire"
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
	stream, err := c.streams.Read(ctx, &bytestream.ReadRequest{ResourceName: name.String(), ReadOffset: offset}, c.wire)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("open blob %s: %w", d, fromStatus(err))
	}
	if name.Compressor != repb.Compressor_IDENTITY {
		r, err := c.openCompressed(&messages{in: incoming{stream: stream}, digest: d}, cancel, due)
		if err != nil {
			cancel()
		}
		return r, err
	}
	r := &reader{in: incoming{stream: stream}, cancel: cancel, digest: d, due: due}
	// That a blob is not there is known only by the first answer.
	if err := r.fill(); err != nil && !errors.Is(err, io.EOF) {
		cancel()
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	return r, nil
}

// incoming is what a stream brings, left in the buffers that it came in.
type incoming struct {
	stream bytestream.ByteStream_ReadClient
	msg    wire.ReadResponse
	pieces mem.BufferSlice // of msg and not yet in data
	data   []byte          // of a piece and not yet read
}

// receive takes the next message, in place of the one before, and returns how
// many bytes it has.
func (in *incoming) receive() (int, error) {
	in.free()
	if err := in.stream.RecvMsg(&in.msg); err != nil {
		return 0, err //nolint:wrapcheck // the caller does
	}
	in.pieces = in.msg.Pieces()
	return in.pieces.Len(), nil
}

// more reports whether there is data to be read.
func (in *incoming) more() bool {
	for len(in.data) == 0 && len(in.pieces) > 0 {
		in.data, in.pieces = in.pieces[0].ReadOnlyData(), in.pieces[1:]
	}
	return len(in.data) > 0
}

// read reads some of the data.
func (in *incoming) read(p []byte) int {
	n := copy(p, in.data)
	in.data = in.data[n:]
	return n
}

// free gives up what is not yet read.
func (in *incoming) free() {
	in.msg.Free()
	in.pieces, in.data = nil, nil
}

// reader reads a blob from a stream.
type reader struct {
	in     incoming
	cancel context.CancelFunc
	digest digest.Digest
	due    int64 // bytes that have not been received
	err    error
}

// fill receives until there is data, or an error, which is io.EOF at the end.
func (r *reader) fill() error {
	for !r.in.more() && r.err == nil {
		n, err := r.in.receive()
		switch {
		case errors.Is(err, io.EOF) && r.due == 0:
			r.err = io.EOF
		case errors.Is(err, io.EOF):
			r.err = fmt.Errorf("read blob %s: %w: the server's copy ends %d bytes early", r.digest, blob.ErrCorrupt, r.due)
		case err != nil:
			r.err = fmt.Errorf("read blob %s: %w", r.digest, fromStatus(err))
		case int64(n) > r.due:
			r.in.free()
			r.err = fmt.Errorf("read blob %s: %w: the server sends more than its %d bytes", r.digest, blob.ErrCorrupt, r.digest.Size())
		default:
			r.due -= int64(n)
		}
	}
	if r.in.more() {
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
	return r.in.read(p), nil
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
		n, err := w.Write(r.in.data)
		total += int64(n)
		r.in.data = r.in.data[n:]
		if err != nil {
			return total, err //nolint:wrapcheck // the writer's own
		}
	}
}

// Close implements io.Closer.
func (r *reader) Close() error {
	r.cancel()
	r.in.free()
	if r.err == nil {
		r.err = fmt.Errorf("read blob %s: %w", r.digest, io.ErrClosedPipe)
	}
	return nil
}
