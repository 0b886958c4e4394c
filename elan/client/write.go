package client

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/compress"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
)

// Create implements blob.Creator, by ByteStream.Write. The server verifies the
// bytes once more.
func (c *Client) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	if err := checkDigest(d); err != nil {
		return nil, fmt.Errorf("create blob: %w", err)
	}
	name := resource.Name{Instance: c.o.Instance, UUID: newUUID(), Digest: d, Compressor: c.compressor(ctx, d.Size())}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.streams.Write(ctx, c.wire)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("create blob %s: %w", d, fromStatus(err))
	}
	w := &writer{stream: stream, cancel: cancel, digest: d, name: name.String(), chunk: c.o.ChunkBytes}
	if name.Compressor != repb.Compressor_IDENTITY {
		w.codec = c.codec
	}
	return w, nil
}

// writer writes a blob to a stream.
type writer struct {
	stream bytestream.ByteStream_WriteClient
	cancel context.CancelFunc
	digest digest.Digest
	name   string          // until it is sent
	chunk  int             // bytes of a message
	codec  *compress.Codec // nil where the blob travels as it is

	buf   []byte // written and not yet sent, less than chunk
	frame []byte // a buffer for what codec makes of a chunk
	taken int64  // bytes of the blob that were sent
	sent  int64  // bytes as they were sent, compressed or not
	done  bool   // the server ended the call: it failed, or has the blob already
	ended error
}

// fail makes err the end of the writer, after which nothing is committed.
func (w *writer) fail(err error) error {
	w.ended = err
	return err
}

var (
	errClosed    = errors.New("the writer is closed")
	errCommitted = errors.New("the writer is committed")
)

// Write implements io.Writer. It keeps nothing of p.
func (w *writer) Write(p []byte) (int, error) {
	if w.ended != nil {
		return 0, w.ended
	}
	total := len(p)
	if int64(total) > w.digest.Size()-w.taken-int64(len(w.buf)) {
		return 0, w.fail(fmt.Errorf("write blob %s: more than its %d bytes", w.digest, w.digest.Size()))
	}
	for len(p) > 0 {
		// Whole chunks go as they are; what is less waits, so that a small blob,
		// however it is written, goes with Commit in one message.
		if len(w.buf) == 0 && len(p) > w.chunk {
			if err := w.send(p[:w.chunk], false); err != nil {
				return total - len(p), w.fail(err)
			}
			p = p[w.chunk:]
			continue
		}
		if w.buf == nil {
			w.buf = make([]byte, 0, min(int64(w.chunk), w.digest.Size()-w.taken))
		}
		if len(w.buf) == w.chunk {
			if err := w.send(w.buf, false); err != nil {
				return total - len(p), w.fail(err)
			}
			w.buf = w.buf[:0]
			continue
		}
		n := min(len(p), w.chunk-len(w.buf))
		w.buf = append(w.buf, p[:n]...)
		p = p[n:]
	}
	return total, nil
}

// send sends one message. After the server has ended the call it does nothing.
func (w *writer) send(data []byte, finish bool) error {
	if w.done {
		return nil
	}
	n := int64(len(data))
	if w.codec != nil {
		w.frame = w.codec.Append(w.frame[:0], data)
		data = w.frame
	}
	err := w.stream.Send(&bytestream.WriteRequest{ResourceName: w.name, WriteOffset: w.sent, FinishWrite: finish, Data: data})
	w.name = ""
	switch {
	case errors.Is(err, io.EOF):
		// What the end means, CloseAndRecv tells.
		w.done = true
		return w.result()
	case err != nil:
		return fmt.Errorf("write blob %s: %w", w.digest, fromStatus(err))
	}
	w.taken += n
	w.sent += int64(len(data))
	return nil
}

// result receives the server's answer.
func (w *writer) result() error {
	resp, err := w.stream.CloseAndRecv()
	if err != nil {
		return fmt.Errorf("write blob %s: %w", w.digest, fromStatus(err))
	}
	if n := resp.CommittedSize; !w.complete(n) {
		return fmt.Errorf("write blob %s: %w: the server committed %d of %d bytes", w.digest, blob.ErrUnavailable, n, w.digest.Size())
	}
	return nil
}

// complete reports whether a committed_size says that the blob is there.
func (w *writer) complete(n int64) bool {
	if w.codec == nil {
		return n == w.digest.Size()
	}
	// It counts what was sent, or is -1 where another's upload came first. Some
	// servers tell the size of the blob in both cases.
	return n == -1 || n == w.digest.Size() || (!w.done && n == w.sent)
}

// Commit implements blob.Writer.
func (w *writer) Commit() error {
	if w.ended != nil {
		return w.ended
	}
	w.ended = errCommitted
	if w.done {
		return nil
	}
	if n := w.taken + int64(len(w.buf)); n != w.digest.Size() {
		return fmt.Errorf("commit blob %s: %d of %d bytes were written", w.digest, n, w.digest.Size())
	}
	if err := w.send(w.buf, true); err != nil || w.done {
		return err
	}
	return w.result()
}

// Close implements blob.Writer.
func (w *writer) Close() error {
	w.cancel()
	w.ended, w.buf, w.frame = errClosed, nil, nil
	return nil
}

// newUUID is a random UUID (version 4), which tells uploads of one blob apart.
func newUUID() string {
	var u [16]byte
	_, _ = rand.Read(u[:]) // it never fails
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
