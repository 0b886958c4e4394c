package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
	"github.com/mettle-build/mettle/elan/status"
	"github.com/mettle-build/mettle/elan/wire"
)

const (
	// readChunk is how much of a blob goes into one message: what a client's
	// message limit surely holds, and what makes the cost of a message small.
	readChunk = 1 << 20
	// maxLargeReads is how many Reads at once send such chunks. One whose client
	// takes its time holds about three: the one that is read into, one on its
	// way, and one that waits for it.
	maxLargeReads = 32
	// smallReadChunk is what the others send. With what a message adds it fits
	// into a buffer of 64 KiB.
	smallReadChunk = 64<<10 - 64
)

type byteStreamServer struct {
	bytestream.UnimplementedByteStreamServer
	o       Options
	codec   *codec
	uploads *uploads
	readers atomic.Int64 // the Reads that are going on
	writers atomic.Int64 // the Writes that are, but for those of one message
}

// Read streams a blob from an offset, up to a limit. The offset is in bytes of the
// blob, compressed or not; a compressed one has no limit.
func (s *byteStreamServer) Read(req *bytestream.ReadRequest, stream bytestream.ByteStream_ReadServer) error {
	if s.isLog(req.ResourceName) {
		return s.readLog(req, stream)
	}
	name, err := resource.ParseRead(req.ResourceName)
	if err != nil {
		return status.From(err)
	}
	store, err := s.o.storeOf(name.Instance)
	if err != nil {
		return status.From(err)
	}
	if err := checkCompressor(name.Compressor); err != nil {
		return err
	}
	d, offset, compressed := name.Digest, req.ReadOffset, name.Compressor != repb.Compressor_IDENTITY
	switch {
	case offset < 0 || offset > d.Size():
		return gstatus.Errorf(codes.OutOfRange, "read_offset is %d, want 0 to %d, the size of the blob", offset, d.Size())
	case req.ReadLimit < 0:
		return gstatus.Errorf(codes.InvalidArgument, "read_limit is %d, want 0 for no limit, or more", req.ReadLimit)
	case compressed && req.ReadLimit != 0:
		return gstatus.Errorf(codes.InvalidArgument, "read_limit is %d, want 0 for a compressed blob", req.ReadLimit)
	}
	due := d.Size() - offset
	if req.ReadLimit > 0 {
		due = min(due, req.ReadLimit)
	}
	if compressed && offset == 0 {
		if sent, err := s.sendKept(stream, store, d); sent {
			return err
		}
	}
	r, err := store.Open(stream.Context(), d, offset)
	s.o.reads.count(err)
	if err != nil {
		return status.FromRead(fmt.Errorf("open blob %s: %w", d, err))
	}
	defer r.Close() //nolint:errcheck // opened for reading
	if compressed {
		return s.sendCompressed(stream, r, d, due)
	}
	return s.send(stream, r, d, due)
}

// send streams the next due bytes of r.
func (s *byteStreamServer) send(stream bytestream.ByteStream_ReadServer, r io.Reader, d digest.Digest, due int64) error {
	if due == 0 {
		return nil
	}
	chunk := s.beginRead(due)
	defer s.readers.Add(-1)
	for due > 0 {
		// It is read into where it is sent from.
		msg := wire.NewReadResponse(s.o.pool, int(min(due, chunk)))
		n, err := readFull(r, msg.Room(), due)
		if err != nil {
			return status.FromRead(fmt.Errorf("read blob %s: %w", d, err))
		}
		msg.SetLen(n)
		if err := stream.SendMsg(msg); err != nil {
			return err //nolint:wrapcheck // a status already
		}
		due -= int64(n)
	}
	return nil
}

// beginRead counts a Read of due bytes, which the caller takes off the count at
// its end, and returns how much of them is to be read for one message.
func (s *byteStreamServer) beginRead(due int64) int64 {
	if s.readers.Add(1) > maxLargeReads {
		return min(due, smallReadChunk)
	}
	return min(due, readChunk)
}

// readFull fills p from r, the store's, which has due bytes more to bring.
func readFull(r io.Reader, p []byte, due int64) (int, error) {
	n, err := io.ReadFull(r, p)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("%w: the store's copy ends %d bytes early", blob.ErrCorrupt, due-int64(n))
	}
	return n, err //nolint:wrapcheck // the store's own
}

// QueryWriteStatus says how much of an upload is here. Of one that nobody knows
// that is nothing: clients begin anew then, whereas NOT_FOUND makes them fail. So
// it is for a compressed one that is not complete.
func (s *byteStreamServer) QueryWriteStatus(ctx context.Context, req *bytestream.QueryWriteStatusRequest) (*bytestream.QueryWriteStatusResponse, error) {
	if s.isLog(req.ResourceName) {
		return s.queryLog(ctx, req.ResourceName)
	}
	name, err := resource.ParseWrite(req.ResourceName)
	if err != nil {
		return nil, status.From(err)
	}
	store, err := s.o.storeOf(name.Instance)
	if err != nil {
		return nil, status.From(err)
	}
	if err := checkCompressor(name.Compressor); err != nil {
		return nil, err
	}
	there, err := has(ctx, store, name.Digest)
	if err != nil {
		return nil, status.FromRead(err)
	}
	if there {
		return &bytestream.QueryWriteStatusResponse{CommittedSize: name.Digest.Size(), Complete: true}, nil
	}
	return &bytestream.QueryWriteStatusResponse{CommittedSize: s.uploads.received(req.ResourceName)}, nil
}

func has(ctx context.Context, store blob.Finder, d digest.Digest) (bool, error) {
	missing, err := store.FindMissing(ctx, []digest.Digest{d})
	if err != nil {
		return false, fmt.Errorf("look up blob %s: %w", d, err)
	}
	return len(missing) == 0, nil
}
