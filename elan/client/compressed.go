package client

import (
	"context"
	"errors"
	"fmt"
	"io"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/compress"
	"github.com/mettle-build/mettle/elan/digest"
)

// compressor is how n bytes of a blob travel: as zstd where they are many enough
// and the server speaks it. It is asked once; where it does not answer, this
// blob goes as it is, and the next one asks again.
func (c *Client) compressor(ctx context.Context, n int64) repb.Compressor_Value {
	if c.codec == nil || n < c.o.CompressFrom {
		return repb.Compressor_IDENTITY
	}
	caps, err := c.ask(ctx)
	if err != nil || !caps.zstd {
		return repb.Compressor_IDENTITY
	}
	return repb.Compressor_ZSTD
}

// compressedReader reads a blob from a stream of zstd.
type compressedReader struct {
	*compress.Reader
	in     *messages
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
	return &compressedReader{Reader: r, in: m, cancel: cancel, digest: m.digest}, nil
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
	err := r.Reader.Close()
	r.in.in.free()
	return err //nolint:wrapcheck // it never fails
}

// messages is the bytes of a stream of ReadResponses, as they come. Its errors
// are of blob's classes, as far as the statuses are.
type messages struct {
	in     incoming
	digest digest.Digest
}

// next receives until there is data; io.EOF is the end.
func (m *messages) next() error {
	for !m.in.more() {
		_, err := m.in.receive()
		if errors.Is(err, io.EOF) {
			return io.EOF
		}
		if err != nil {
			return fromStatus(err)
		}
	}
	return nil
}

// Read implements io.Reader.
func (m *messages) Read(p []byte) (int, error) {
	if err := m.next(); err != nil {
		return 0, err
	}
	return m.in.read(p), nil
}
