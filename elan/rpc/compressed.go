package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
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
	"github.com/mettle-build/mettle/elan/wire"
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

const (
	// maxReadsAhead is how many Reads at once may have more than one message
	// compressed at a time; with more there is work for all CPUs anyway.
	maxReadsAhead = 4
	// maxFramesAhead is how many these compress then. Each takes 2 MiB.
	maxFramesAhead = 4
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
	f := frames{s: s, r: r, d: d, due: due, chunk: chunk}
	if s.readers.Load() <= maxReadsAhead {
		f.ahead = min(runtime.GOMAXPROCS(0), maxFramesAhead) - 1
	}
	defer f.wait()
	for {
		msg, err := f.next()
		if err != nil || msg == nil {
			return err
		}
		if err := stream.SendMsg(msg); err != nil {
			return err //nolint:wrapcheck // a status already
		}
	}
}

// frames reads a blob and compresses it, a frame a message. While one is sent the
// next ones are compressed: that takes several times as long as sending.
type frames struct {
	s     *byteStreamServer
	r     io.Reader
	d     digest.Digest
	due   int64 // bytes that are not yet read
	chunk int64 // of them in a message

	ahead int // how many messages beside the one that is waited for
	begun []chan *wire.ReadResponse
}

// next is the next message; nil is the end. The error is a status.
func (f *frames) next() (*wire.ReadResponse, error) {
	for f.due > 0 && len(f.begun) <= f.ahead {
		if err := f.begin(); err != nil {
			return nil, err
		}
	}
	if len(f.begun) == 0 {
		return nil, nil //nolint:nilnil // the end is no error
	}
	first := f.begun[0]
	f.begun = f.begun[1:]
	return <-first, nil
}

// begin reads the bytes of a message, and has them compressed.
func (f *frames) begin() error {
	pool := f.s.o.pool
	raw := pool.Get(int(min(f.due, f.chunk)))
	n, err := readFull(f.r, *raw, f.due)
	if err != nil {
		pool.Put(raw)
		return status.FromRead(fmt.Errorf("read blob %s: %w", f.d, err))
	}
	f.due -= int64(n)
	ready := make(chan *wire.ReadResponse, 1) // the result, so that nobody waits for its reader
	f.begun = append(f.begun, ready)
	compress := func() {
		msg := wire.NewReadResponse(pool, f.s.codec.MaxFrame(n))
		msg.SetLen(len(f.s.codec.Append(msg.Room()[:0], *raw)))
		pool.Put(raw)
		ready <- msg
	}
	if f.ahead == 0 || f.due == 0 && len(f.begun) == 1 {
		compress()
		return nil
	}
	go compress()
	return nil
}

// wait returns when nothing is compressed any more.
func (f *frames) wait() {
	for _, ready := range f.begun {
		(<-ready).Free()
	}
}

// compressBatched compresses data, in its place, where that is worthwhile, and
// returns how many bytes there are then: as many as before where it is not.
func (c *codec) compressBatched(data []byte) int {
	if len(data) < minBatchCompress {
		return len(data)
	}
	frame := c.Append(make([]byte, 0, len(data)), data)
	if len(frame) > len(data)-len(data)/minBatchSaving {
		return len(data)
	}
	return copy(data, frame)
}

// writeCompressed receives a blob that is not there, from its first message req
// on. It can't be resumed: what a decoder knows is not worth keeping for that,
// and QueryWriteStatus tells clients to begin anew.
func (s *byteStreamServer) writeCompressed(stream writeStream, store blob.Creator, req *wire.WriteRequest, d digest.Digest) error {
	if req.WriteOffset != 0 {
		return gstatus.Errorf(codes.InvalidArgument, "write_offset is %d, want 0: a compressed upload can't be resumed, only begun anew", req.WriteOffset)
	}
	in := &messages{stream: stream, pool: s.o.pool, name: req.ResourceName, msg: req}
	err := in.take()
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
	kept, ok := blob.As[blob.CompressedReceiver](store)
	if !ok && d.Size() <= compress.SmallBytes {
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
	if ok {
		return kept.ReceiveCompressed(ctx, d, in) //nolint:wrapcheck // it says what was received
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
	if kept, ok := blob.As[blob.CompressedReceiver](store); ok {
		return kept.ReceiveCompressed(ctx, d, bytes.NewReader(data)) //nolint:wrapcheck // it says what was received
	}
	raw, err := c.Decode(data, d.Size())
	if err != nil {
		return fmt.Errorf("receive blob %s: %w", d, err)
	}
	return blob.ReceiveBytes(ctx, store, d, raw) //nolint:wrapcheck // it says what was received
}

// messages reads the bytes of a Write. Its errors, but io.EOF, are statuses.
type messages struct {
	stream   writeStream
	pool     mem.BufferPool
	name     string
	msg      *wire.WriteRequest // the last one
	pieces   mem.BufferSlice    // of msg and not yet read
	data     []byte             // of a piece and not yet read
	received int64              // bytes, as they came
	finished bool               // no more messages come
}

// take accepts msg. Offsets count the bytes as they come, compressed.
func (m *messages) take() error {
	if m.msg.ResourceName != "" && m.msg.ResourceName != m.name {
		return wrongName(m.msg.ResourceName, m.name)
	}
	if m.msg.WriteOffset != m.received {
		return wrongOffset(m.msg.WriteOffset, m.received)
	}
	m.pieces, m.finished = m.msg.Pieces(), m.msg.FinishWrite
	m.received += int64(m.msg.Len())
	return nil
}

// next takes messages until there are pieces; io.EOF is the end.
func (m *messages) next() error {
	for len(m.pieces) == 0 {
		if m.finished {
			return io.EOF
		}
		m.msg.Free()
		err := m.stream.RecvMsg(m.msg)
		if errors.Is(err, io.EOF) {
			// Whether all is here, the frames tell.
			m.finished = true
			return io.EOF
		}
		if err != nil {
			return err //nolint:wrapcheck // a status already
		}
		if err := m.take(); err != nil {
			return err
		}
	}
	return nil
}

// Read implements io.Reader.
func (m *messages) Read(p []byte) (int, error) {
	for len(m.data) == 0 {
		if err := m.next(); err != nil {
			return 0, err
		}
		m.data, m.pieces = m.pieces[0].ReadOnlyData(), m.pieces[1:]
	}
	n := copy(p, m.data)
	m.data = m.data[n:]
	return n, nil
}

// all is all the bytes, of which more than limit are an error. They are valid
// until the last message is freed.
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
		case m.finished && data == nil:
			// Mostly one message brings it all, which is not copied then.
			data = m.msg.Bytes(m.pool)
		default:
			for _, piece := range m.pieces {
				data = append(data, piece.ReadOnlyData()...)
			}
		}
		m.pieces = nil
	}
}
