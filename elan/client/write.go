package client

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"

	"google.golang.org/genproto/googleapis/bytestream"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
)

// Create implements blob.Creator, by ByteStream.Write. The server verifies the
// bytes once more.
func (c *Client) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	if d.IsZero() {
		return nil, fmt.Errorf("create blob: %w: it is the zero digest", digest.ErrInvalid)
	}
	name := resource.Name{Instance: c.o.Instance, UUID: newUUID(), Digest: d}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.streams.Write(ctx)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("create blob %s: %w", d, fromStatus(err))
	}
	return &writer{stream: stream, cancel: cancel, digest: d, name: name.String(), chunk: c.o.ChunkBytes}, nil
}

// writer writes a blob to a stream.
type writer struct {
	stream bytestream.ByteStream_WriteClient
	cancel context.CancelFunc
	digest digest.Digest
	name   string // until it is sent
	chunk  int    // bytes of a message

	buf   []byte // written and not yet sent, less than chunk
	sent  int64
	done  bool // the server ended the call: it failed, or has the blob already
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
	if int64(total) > w.digest.Size()-w.sent-int64(len(w.buf)) {
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
			w.buf = make([]byte, 0, min(int64(w.chunk), w.digest.Size()-w.sent))
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
	w.sent += int64(len(data))
	return nil
}

// result receives the server's answer.
func (w *writer) result() error {
	resp, err := w.stream.CloseAndRecv()
	if err != nil {
		return fmt.Errorf("write blob %s: %w", w.digest, fromStatus(err))
	}
	if resp.CommittedSize != w.digest.Size() {
		return fmt.Errorf("write blob %s: %w: the server committed %d of %d bytes", w.digest, blob.ErrUnavailable, resp.CommittedSize, w.digest.Size())
	}
	return nil
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
	if n := w.sent + int64(len(w.buf)); n != w.digest.Size() {
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
	w.ended, w.buf = errClosed, nil
	return nil
}

// newUUID is a random UUID (version 4), which tells uploads of one blob apart.
func newUUID() string {
	var u [16]byte
	_, _ = rand.Read(u[:]) // it never fails
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
