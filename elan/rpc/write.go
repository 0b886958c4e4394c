package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
	"github.com/mettle-build/mettle/elan/status"
	"github.com/mettle-build/mettle/elan/wire"
)

const (
	// gatherBytes is how much of an upload goes to the store at once: Bazel sends
	// 16 KiB a message, and a call of the store for each costs more than these.
	gatherBytes = 256 << 10
	// gatherPieces bounds the buffers that are kept for that, of up to 16 KiB each,
	// since of a buffer there may be no more than a byte. Bazel's messages make for 32.
	gatherPieces = 128
	// maxLargeWrites is how many uploads at once may have bytes in memory beyond
	// the message that they receive: what was gathered, and one message, or what
	// was gathered before, that is being hashed.
	maxLargeWrites = 32
)

type writeStream = bytestream.ByteStream_WriteServer

// Write takes a blob in messages of any size. It ends at once, without reading
// on, where the blob is there already. Where the stream breaks, what came is
// kept for a while, and another stream of the same resource name goes on at the
// offset that QueryWriteStatus tells, or begins anew at 0. A compressed one
// always begins anew.
func (s *byteStreamServer) Write(stream writeStream) error {
	req := &wire.WriteRequest{}
	defer req.Free()
	err := stream.RecvMsg(req)
	if errors.Is(err, io.EOF) {
		return gstatus.Error(codes.InvalidArgument, "the stream ended before a first message with a resource_name")
	}
	if err != nil {
		return err //nolint:wrapcheck // a status already
	}
	if s.isLog(req.ResourceName) {
		return s.writeLog(stream, req)
	}
	name, err := resource.ParseWrite(req.ResourceName)
	if err != nil {
		return status.From(err)
	}
	if err := checkCompressor(name.Compressor); err != nil {
		return err
	}
	store, err := s.o.storeOf(name.Instance)
	if err != nil {
		return status.From(err)
	}
	d, compressed := name.Digest, name.Compressor != repb.Compressor_IDENTITY
	if err := checkSize(s.o, d); err != nil {
		return status.From(err)
	}
	there, err := has(stream.Context(), store, d)
	if err != nil {
		return status.FromRead(err)
	}
	if there && compressed {
		return stream.SendAndClose(&bytestream.WriteResponse{CommittedSize: committedElsewhere})
	}
	if there {
		return stream.SendAndClose(&bytestream.WriteResponse{CommittedSize: d.Size()})
	}
	if compressed {
		return s.writeCompressed(stream, store, req, d)
	}
	if req.FinishWrite && req.WriteOffset == 0 {
		// Most blobs are small, and come in one message.
		if err := blob.ReceiveBytes(stream.Context(), store, d, req.Bytes(s.o.pool)); err != nil {
			return status.From(err)
		}
		return stream.SendAndClose(&bytestream.WriteResponse{CommittedSize: d.Size()})
	}
	u, err := s.begin(stream.Context(), store, req, d)
	if err != nil {
		return err
	}
	size, err := s.receive(stream, u, req)
	if err != nil {
		return err
	}
	return stream.SendAndClose(&bytestream.WriteResponse{CommittedSize: size})
}

// begin finds the upload that req goes on with, or begins one. The caller has
// it for itself, and ends that by s.uploads.suspend or s.uploads.end.
func (s *byteStreamServer) begin(ctx context.Context, store blob.Creator, req *wire.WriteRequest, d digest.Digest) (*upload, error) {
	if req.WriteOffset == 0 {
		// The upload outlives this call if the stream breaks, and so must what
		// its writer does; ending it cancels that.
		own, cancel := context.WithCancel(context.WithoutCancel(ctx))
		w, err := store.Create(own, d)
		if err != nil {
			cancel()
			return nil, status.From(fmt.Errorf("create blob %s: %w", d, err))
		}
		u := &upload{name: req.ResourceName, digest: d, w: blob.Verify(w, d), cancel: cancel}
		s.uploads.add(u)
		return u, nil
	}
	if req.WriteOffset < 0 || req.WriteOffset > d.Size() {
		return nil, gstatus.Errorf(codes.InvalidArgument, "write_offset is %d, outside the blob's %d bytes", req.WriteOffset, d.Size())
	}
	u, err := s.uploads.resume(ctx, req.ResourceName)
	if err != nil {
		return nil, err
	}
	if u == nil {
		// It was too old to be kept, or began at another server of the same store.
		// The code makes clients ask QueryWriteStatus, which says 0 here, and begin
		// anew, where INVALID_ARGUMENT would make them fail.
		return nil, gstatus.Errorf(codes.Aborted, "write_offset is %d, and nothing of this upload is here: begin anew", req.WriteOffset)
	}
	if n := u.received.Load(); req.WriteOffset != n {
		s.uploads.suspend(u)
		return nil, wrongOffset(req.WriteOffset, n)
	}
	return u, nil
}

// wrongOffset is the error about a write_offset other than what is due.
func wrongOffset(got, want int64) error {
	return gstatus.Errorf(codes.InvalidArgument, "write_offset is %d, want %d, the number of bytes received so far", got, want)
}

// wrongName is the error about a resource_name that changes within a stream.
func wrongName(got, want string) error {
	return gstatus.Errorf(codes.InvalidArgument, "resource_name is %q, want that of the first message, %q, or none", got, want)
}

// receive takes the messages of the stream from req on, and returns the size
// that is committed. It ends the upload u, or suspends it where the stream broke.
func (s *byteStreamServer) receive(stream writeStream, u *upload, req *wire.WriteRequest) (int64, error) {
	ahead := s.writers.Add(1) <= maxLargeWrites
	defer s.writers.Add(-1)
	for {
		if err := u.take(req, ahead); err != nil {
			s.uploads.end(u)
			return 0, err
		}
		if req.FinishWrite {
			return s.commit(u)
		}
		err := stream.RecvMsg(req)
		switch {
		case errors.Is(err, io.EOF) && u.received.Load() == u.digest.Size():
			// All is here; that the last message did not say so takes nothing from it.
			return s.commit(u)
		case errors.Is(err, io.EOF):
			// A client may stop halfway, and learns how far it came.
			n := u.received.Load()
			return n, s.suspend(u)
		case err != nil:
			if e := s.suspend(u); e != nil {
				return 0, e
			}
			return 0, err //nolint:wrapcheck // a status already
		}
	}
}

// suspend stores what was received, and keeps the upload for another stream.
func (s *byteStreamServer) suspend(u *upload) error {
	err := u.flush()
	if err != nil {
		s.uploads.end(u)
		return status.From(err)
	}
	u.w.Wait()
	s.uploads.suspend(u)
	return nil
}

func (s *byteStreamServer) commit(u *upload) (int64, error) {
	err := u.flush()
	if err == nil {
		err = u.w.Commit()
	}
	s.uploads.end(u)
	if err != nil {
		return 0, status.From(err)
	}
	return u.digest.Size(), nil
}

// take takes over the bytes of one message. Where it may work ahead, those of
// small messages are gathered, and they are hashed while others are received.
// The error is a status.
func (u *upload) take(req *wire.WriteRequest, ahead bool) error {
	if req.ResourceName != "" && req.ResourceName != u.name {
		return wrongName(req.ResourceName, u.name)
	}
	// Offsets count what was received, which is what the client knows.
	n := u.received.Load()
	if req.WriteOffset != n {
		return wrongOffset(req.WriteOffset, n)
	}
	n += int64(req.Len())
	u.gathered.add(req)
	u.received.Store(n)
	if ahead && u.gathered.bytes < gatherBytes && len(u.gathered.data) < gatherPieces && n <= u.digest.Size() {
		return nil
	}
	err := u.flush()
	if !ahead {
		u.w.Wait()
	}
	return status.From(err)
}

// flush passes on what was gathered.
func (u *upload) flush() error {
	g := u.gathered
	u.gathered = gathered{}
	if g.bytes == 0 {
		return nil
	}
	pieces := make([][]byte, len(g.data))
	for i, b := range g.data {
		pieces[i] = b.ReadOnlyData()
	}
	return u.w.WritePieces(pieces, g.data.Free) //nolint:wrapcheck // it says what was received
}

// gathered are bytes of an upload that are received and not yet stored.
type gathered struct {
	data  mem.BufferSlice
	bytes int
}

// add takes over the bytes of req.
func (g *gathered) add(req *wire.WriteRequest) {
	g.bytes += req.Len()
	data := req.Take()
	if g.data == nil {
		g.data = data
		return
	}
	g.data = append(g.data, data...)
}
