package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/compress"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/status"
)

const (
	// committedElsewhere is the committed_size that tells the sender of a
	// compressed blob that it is there already.
	committedElsewhere = -1
	// minBatchCompress is from which size on a blob in a batch is compressed:
	// below it a frame's header and the receiver's work eat up what is gained.
	minBatchCompress = 512
	// minBatchSaving is the part of a blob, one in so many bytes, that must be
	// saved for the receiver's work of decompressing it to be worthwhile.
	minBatchSaving = 8
)

// compressors are those that GetCapabilities announces, for streams and for
// batches. Deflate and Brotli are slower at any ratio, and no client asks for
// them where it can have zstd.
func compressors() []repb.Compressor_Value { return []repb.Compressor_Value{repb.Compressor_ZSTD} }

// checkCompressor refuses a compressor that is not announced.
func checkCompressor(c repb.Compressor_Value) error {
	if c == repb.Compressor_IDENTITY || slices.Contains(compressors(), c) {
		return nil
	}
	return gstatus.Errorf(codes.InvalidArgument, "compressor %v is not supported by this server, which announces %v: send and ask for blobs so, or as they are", c, compressors())
}

// codec is what the services compress by, and how much of it at once.
type codec struct {
	*compress.Codec
	// decoders has a place for each stream that is decoded with a window of its
	// own. Streams wait for a place, which the others give back within the time
	// that their uploads take.
	decoders chan struct{}
}

func newCodec(o Options) (*codec, error) {
	c, err := compress.New()
	if err != nil {
		return nil, err //nolint:wrapcheck // it says what it is of
	}
	return &codec{Codec: c, decoders: make(chan struct{}, o.MaxDecoders)}, nil
}

// sendCompressed streams the next due bytes of r, a frame a message.
func (s *byteStreamServer) sendCompressed(stream bytestream.ByteStream_ReadServer, r io.Reader, d digest.Digest, due int64) error {
	if due == 0 {
		return stream.Send(&bytestream.ReadResponse{Data: s.codec.Append(nil, nil)}) //nolint:wrapcheck // a status already
	}
	chunk := s.beginRead(due)
	defer s.readers.Add(-1)
	// As in send, one pair of buffers serves all messages.
	pool := mem.DefaultBufferPool()
	raw, frame := pool.Get(int(chunk)), pool.Get(s.codec.MaxFrame(int(chunk)))
	defer pool.Put(raw)
	defer pool.Put(frame)
	msg := &bytestream.ReadResponse{}
	for due > 0 {
		n, err := readFull(r, (*raw)[:min(due, chunk)], due)
		if err != nil {
			return status.FromRead(fmt.Errorf("read blob %s: %w", d, err))
		}
		msg.Data = s.codec.Append((*frame)[:0], (*raw)[:n])
		if err := stream.Send(msg); err != nil {
			return err //nolint:wrapcheck // a status already
		}
		due -= int64(n)
	}
	return nil
}

// compressBatched compresses the blob of r where that is worthwhile.
func (c *codec) compressBatched(r *repb.BatchReadBlobsResponse_Response) {
	if len(r.Data) < minBatchCompress {
		return
	}
	frame := c.Append(make([]byte, 0, len(r.Data)), r.Data)
	if len(frame) <= len(r.Data)-len(r.Data)/minBatchSaving {
		r.Data, r.Compressor = frame, repb.Compressor_ZSTD
	}
}

// writeCompressed receives a blob that is not there, from its first message req
// on. It can't be resumed: what a decoder knows is not worth keeping for that,
// and QueryWriteStatus tells clients to begin anew.
func (s *byteStreamServer) writeCompressed(stream writeStream, store blob.Creator, req *bytestream.WriteRequest, d digest.Digest) error {
	if req.WriteOffset != 0 {
		return gstatus.Errorf(codes.InvalidArgument, "write_offset is %d, want 0: a compressed upload can't be resumed, only begun anew", req.WriteOffset)
	}
	in := &messages{stream: stream, name: req.ResourceName}
	err := in.take(req)
	if err == nil {
		err = s.codec.receive(stream.Context(), store, d, in)
	}
	if err != nil {
		return status.From(err)
	}
	return stream.SendAndClose(&bytestream.WriteResponse{CommittedSize: in.received}) //nolint:wrapcheck // a status already
}

// receive decompresses what in brings, verifies it, and puts it into the store.
func (c *codec) receive(ctx context.Context, store blob.Creator, d digest.Digest, in *messages) error {
	if d.Size() <= compress.SmallBytes {
		data, err := in.all(compress.MaxInput(d.Size()))
		if err != nil {
			return err
		}
		return c.receiveBytes(ctx, store, d, data)
	}
	select {
	case c.decoders <- struct{}{}:
		defer func() { <-c.decoders }()
	case <-ctx.Done():
		return fmt.Errorf("wait for a decoder: %w", ctx.Err())
	}
	r, err := c.NewReader(in, d.Size())
	if err != nil {
		return err //nolint:wrapcheck // it says what it is of
	}
	defer r.Close()                       //nolint:errcheck // it never fails
	return blob.Receive(ctx, store, d, r) //nolint:wrapcheck // it says what was received
}

// receiveBytes is receive for bytes that are all here, of a blob small enough to
// be in memory.
func (c *codec) receiveBytes(ctx context.Context, store blob.Creator, d digest.Digest, data []byte) error {
	raw, err := c.Decode(data, d.Size())
	if err != nil {
		return fmt.Errorf("receive blob %s: %w", d, err)
	}
	return blob.ReceiveBytes(ctx, store, d, raw) //nolint:wrapcheck // it says what was received
}

// messages reads the bytes of a Write. Its errors, but io.EOF, are statuses.
type messages struct {
	stream   writeStream
	name     string
	data     []byte // received and not yet read
	received int64  // bytes, as they came
	finished bool   // no more messages come
}

// take accepts one message. Offsets count the bytes as they come, compressed.
func (m *messages) take(req *bytestream.WriteRequest) error {
	if req.ResourceName != "" && req.ResourceName != m.name {
		return wrongName(req.ResourceName, m.name)
	}
	if req.WriteOffset != m.received {
		return wrongOffset(req.WriteOffset, m.received)
	}
	m.data, m.finished = req.Data, req.FinishWrite
	m.received += int64(len(req.Data))
	return nil
}

// next takes messages until there is data; io.EOF is the end.
func (m *messages) next() error {
	for len(m.data) == 0 {
		if m.finished {
			return io.EOF
		}
		req, err := m.stream.Recv()
		if errors.Is(err, io.EOF) {
			// Whether all is here, the frames tell.
			m.finished = true
			return io.EOF
		}
		if err != nil {
			return err //nolint:wrapcheck // a status already
		}
		if err := m.take(req); err != nil {
			return err
		}
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

// all is all the bytes, of which more than limit are an error. What comes in one
// message is not copied.
func (m *messages) all(limit int64) ([]byte, error) {
	var data []byte
	for {
		err := m.next()
		switch {
		case errors.Is(err, io.EOF):
			return data, nil
		case err != nil:
			return nil, err
		case m.received > limit:
			return nil, fmt.Errorf("%w: more than %d compressed bytes", blob.ErrCorrupt, limit)
		case data == nil:
			data = m.data
		default:
			data = append(data, m.data...)
		}
		m.data = nil
	}
}
