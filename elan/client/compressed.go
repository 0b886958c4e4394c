package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"

	"github.com/mettle-build/mettle/elan/compress"
	"github.com/mettle-build/mettle/elan/digest"
)

// offer is what the server says about zstd.
type offer int32

const (
	offerUnknown offer = iota
	offerNone
	offerZstd
)

// compressor is how n bytes of a blob travel: as zstd where they are many enough
// and the server speaks it. It is asked once; where it does not answer, this
// blob goes as it is, and the next one asks again.
func (c *Client) compressor(ctx context.Context, n int64) repb.Compressor_Value {
	if c.codec == nil || n < c.o.CompressFrom {
		return repb.Compressor_IDENTITY
	}
	o := offer(c.offer.Load())
	if o == offerUnknown {
		caps, err := c.capabilities.GetCapabilities(ctx, &repb.GetCapabilitiesRequest{InstanceName: c.o.Instance})
		if err != nil {
			return repb.Compressor_IDENTITY
		}
		o = offerNone
		if slices.Contains(caps.GetCacheCapabilities().GetSupportedCompressors(), repb.Compressor_ZSTD) {
			o = offerZstd
		}
		c.offer.Store(int32(o))
	}
	if o == offerZstd {
		return repb.Compressor_ZSTD
	}
	return repb.Compressor_IDENTITY
}

// compressedReader reads a blob from a stream of zstd.
type compressedReader struct {
	*compress.Reader
	cancel context.CancelFunc
	digest digest.Digest
}

// openCompressed is Open's end for a stream of zstd with due bytes of d in it.
func (c *Client) openCompressed(m *messages, cancel context.CancelFunc, due int64) (io.ReadCloser, error) {
	// That a blob is not there is known only by the first answer.
	if err := m.next(); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("open blob %s: %w", m.digest, err)
	}
	r, err := c.codec.NewReader(m, due)
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", m.digest, err)
	}
	return &compressedReader{Reader: r, cancel: cancel, digest: m.digest}, nil
}

// Read implements io.Reader.
func (r *compressedReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("read blob %s: %w", r.digest, err)
	}
	return n, err
}

// Close implements io.Closer.
func (r *compressedReader) Close() error {
	r.cancel()
	return r.Reader.Close() //nolint:wrapcheck // it never fails
}

// messages is the bytes of a stream of ReadResponses, as they come. Its errors
// are of blob's classes, as far as the statuses are.
type messages struct {
	stream bytestream.ByteStream_ReadClient
	digest digest.Digest
	data   []byte // received and not yet read
}

// next receives until there is data; io.EOF is the end.
func (m *messages) next() error {
	for len(m.data) == 0 {
		msg, err := m.stream.Recv()
		if errors.Is(err, io.EOF) {
			return io.EOF
		}
		if err != nil {
			return fromStatus(err)
		}
		m.data = msg.Data
	}
	return nil
}

// Read implements io.Reader.
func (m *messages) Read(p []byte) (int, error) {
	if err := m.next(); err != nil {
		return 0, err
	}
	n := copy(p, m.data)
	m.data = m.data[n:]
	return n, nil
}
