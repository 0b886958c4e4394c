package rpc

import (
	"context"
	"errors"
	"io"
	"net"

	logpb "github.com/bazelbuild/remote-apis/build/bazel/remote/logstream/v1"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/gate"
	"github.com/mettle-build/mettle/elan/logstream"
	"github.com/mettle-build/mettle/elan/resource"
	"github.com/mettle-build/mettle/elan/status"
	"github.com/mettle-build/mettle/elan/wire"
)

// logChunk is how much of a log stream goes into one message: what came since the
// last, mostly a few lines.
const logChunk = 64<<10 - 64

// logStreamServer is the LogStream API. The streams are read and written to by
// ByteStream, and are neither stored nor hashed.
type logStreamServer struct {
	logpb.UnimplementedLogStreamServiceServer
	logs   *logstream.Streams
	caller func(context.Context) (name, via string) // nil: nobody knows
}

// CreateLogStream makes a stream, whose parent is an instance name.
func (s *logStreamServer) CreateLogStream(ctx context.Context, req *logpb.CreateLogStreamRequest) (*logpb.LogStream, error) {
	name, writeName, err := s.logs.CreateFor(ctx, s.owner(ctx), req.GetParent())
	if err != nil {
		return nil, logStatus(nil, err)
	}
	return &logpb.LogStream{Name: name, WriteResourceName: writeName}, nil
}

// owner is whom the streams are counted for that the call of ctx makes: a machine,
// and who calls from there. API servers call for many.
func (s *logStreamServer) owner(ctx context.Context) string {
	owner := "?"
	if s.caller != nil {
		owner, _ = s.caller(ctx)
	}
	if p, ok := peer.FromContext(ctx); ok {
		if tcp, ok := p.Addr.(*net.TCPAddr); ok {
			owner += "@" + tcp.IP.String()
		}
	}
	return owner
}

// isLog reports whether a name is that of a log stream, as far as there are some.
func (s *byteStreamServer) isLog(name string) bool {
	if s.o.LogStreams == nil {
		return false
	}
	_, ok := resource.ParseLogStream(name)
	return ok
}

// logStatus is an error about a log stream as a status. The trailer, if there is
// somebody to set it, tells a relay and elan/client that another server may have it.
func logStatus(setTrailer func(metadata.MD), err error) error {
	if errors.Is(err, logstream.ErrElsewhere) && setTrailer != nil {
		setTrailer(metadata.Pairs(wire.LogStreamTrailer, wire.LogStreamElsewhere))
	}
	for _, row := range [...]struct {
		class error
		code  codes.Code
	}{
		{logstream.ErrNotFound, codes.NotFound},
		{logstream.ErrInvalid, codes.InvalidArgument},
		{logstream.ErrOffset, codes.OutOfRange},
		{logstream.ErrFinished, codes.FailedPrecondition},
		{logstream.ErrFull, codes.ResourceExhausted},
		{logstream.ErrAborted, codes.Aborted},
		{logstream.ErrClosed, codes.Unavailable},
	} {
		if errors.Is(err, row.class) {
			return gstatus.Error(row.code, err.Error())
		}
	}
	return status.From(err)
}

// readLog sends what the stream has, and then what comes, until it ends.
func (s *byteStreamServer) readLog(req *bytestream.ReadRequest, stream bytestream.ByteStream_ReadServer) error {
	due := req.ReadLimit
	if due < 0 {
		return gstatus.Errorf(codes.InvalidArgument, "read_limit is %d, want 0 for no limit, or more", due)
	}
	r, err := s.o.LogStreams.Open(req.ResourceName, req.ReadOffset)
	if err != nil {
		return logStatus(stream.SetTrailer, err)
	}
	buf := make([]byte, 4<<10)
	for {
		p := buf
		if req.ReadLimit > 0 {
			p = p[:min(int64(len(p)), due)]
		}
		n, err := r.Read(stream.Context(), p)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return logStatus(stream.SetTrailer, err)
		}
		if err := stream.Send(&bytestream.ReadResponse{Data: p[:n]}); err != nil {
			return err //nolint:wrapcheck // a status already
		}
		if due -= int64(n); req.ReadLimit > 0 && due == 0 {
			return nil
		}
		if n == len(buf) && n < logChunk {
			buf = make([]byte, logChunk) // there is much of it
		}
	}
}

// writeLog takes what the stream is to have more, from req on. It may be finished by
// another call, and is not where this one breaks.
func (s *byteStreamServer) writeLog(stream writeStream, req *wire.WriteRequest) error {
	name := req.ResourceName
	release, err := s.o.LogStreams.Hold(name)
	if err != nil {
		return logStatus(stream.SetTrailer, err)
	}
	defer release()
	gate.Patient(stream.Context()) // a command may print nothing for hours
	for {
		committed, err := s.appendLog(stream.Context(), name, req)
		if err != nil {
			return logStatus(stream.SetTrailer, err)
		}
		last := req.FinishWrite
		if !last {
			err = stream.RecvMsg(req)
		}
		if last || errors.Is(err, io.EOF) {
			return stream.SendAndClose(&bytestream.WriteResponse{CommittedSize: committed})
		}
		if err != nil {
			return err //nolint:wrapcheck // a status already
		}
	}
}

// appendLog appends the bytes of one message, and returns how many the stream has.
func (s *byteStreamServer) appendLog(ctx context.Context, name string, req *wire.WriteRequest) (int64, error) {
	if req.ResourceName != "" && req.ResourceName != name {
		return 0, gstatus.Error(codes.InvalidArgument, "resource_name is not that of the first message, nor empty")
	}
	// Also where there are no bytes: it is checked, and shows that the writer is there.
	at, err := s.o.LogStreams.Append(ctx, name, req.WriteOffset, nil)
	for _, p := range req.Pieces() {
		if err == nil {
			at, err = s.o.LogStreams.Append(ctx, name, at, p.ReadOnlyData())
		}
	}
	if req.FinishWrite {
		if errors.Is(err, logstream.ErrFinished) && req.WriteOffset+int64(req.Len()) == at {
			err = nil // by a call whose answer was lost
		}
		if err == nil {
			err = s.o.LogStreams.Finish(ctx, name, at)
		}
	}
	return at, err
}

// queryLog is QueryWriteStatus for a log stream.
func (s *byteStreamServer) queryLog(ctx context.Context, name string) (*bytestream.QueryWriteStatusResponse, error) {
	committed, ended, err := s.o.LogStreams.Status(ctx, name)
	if err != nil {
		return nil, logStatus(func(md metadata.MD) { _ = grpc.SetTrailer(ctx, md) }, err)
	}
	return &bytestream.QueryWriteStatusResponse{CommittedSize: committed, Complete: ended}, nil
}
