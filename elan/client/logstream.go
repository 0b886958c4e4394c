package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	logpb "github.com/bazelbuild/remote-apis/build/bazel/remote/logstream/v1"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/wire"
)

// LogStreams is the writer's side of another server's log streams: see
// elan/logstream. Where several servers share the connection, it finds the one that
// has a stream. It is safe for concurrent use.
type LogStreams struct {
	logs    logpb.LogStreamServiceClient
	streams bytestream.ByteStreamClient
	wire    grpc.CallOption
}

// LogStreams are those of c's server, of all instances.
func (c *Client) LogStreams() LogStreams {
	return LogStreams{logs: logpb.NewLogStreamServiceClient(c.o.Conn), streams: c.streams, wire: c.wire}
}

// Create makes a stream of an instance, and returns its name and that for its writer.
func (l LogStreams) Create(ctx context.Context, parent string) (name, writeName string, err error) {
	s, err := l.logs.CreateLogStream(ctx, &logpb.CreateLogStreamRequest{Parent: parent})
	if err != nil {
		return "", "", fmt.Errorf("create a log stream: %w", fromStatus(err))
	}
	return s.GetName(), s.GetWriteResourceName(), nil
}

// Append appends data, which it does not keep, at offset, and returns how many bytes
// the stream has then.
func (l LogStreams) Append(ctx context.Context, writeName string, offset int64, data []byte) (int64, error) {
	return l.write(ctx, &bytestream.WriteRequest{ResourceName: writeName, WriteOffset: offset, Data: data})
}

// Finish ends a stream that has offset bytes.
func (l LogStreams) Finish(ctx context.Context, writeName string, offset int64) error {
	_, err := l.write(ctx, &bytestream.WriteRequest{ResourceName: writeName, WriteOffset: offset, FinishWrite: true})
	return err
}

func (l LogStreams) write(ctx context.Context, req *bytestream.WriteRequest) (int64, error) {
	var committed int64
	err := ask(ctx, func(ctx context.Context) (metadata.MD, error) {
		stream, err := l.streams.Write(ctx, l.wire)
		if err != nil {
			return nil, err //nolint:wrapcheck // write does
		}
		if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) { // which the answer explains
			return nil, err //nolint:wrapcheck // write does
		}
		resp, err := stream.CloseAndRecv()
		committed = resp.GetCommittedSize()
		return stream.Trailer(), err //nolint:wrapcheck // write does
	})
	if err != nil {
		return 0, fmt.Errorf("write to a log stream: %w", err)
	}
	return committed, nil
}

// Status is how many bytes the stream has, and whether it has ended.
func (l LogStreams) Status(ctx context.Context, writeName string) (committed int64, ended bool, err error) {
	err = ask(ctx, func(ctx context.Context) (metadata.MD, error) {
		var trailer metadata.MD
		resp, err := l.streams.QueryWriteStatus(ctx, &bytestream.QueryWriteStatusRequest{ResourceName: writeName}, grpc.Trailer(&trailer))
		committed, ended = resp.GetCommittedSize(), resp.GetComplete()
		return trailer, err //nolint:wrapcheck // Status does
	})
	if err != nil {
		return 0, false, fmt.Errorf("status of a log stream: %w", err)
	}
	return committed, ended, nil
}

// Follow calls take with what the stream of that name has from offset on, and then
// with what comes, until it ends. Take does not keep the bytes.
func (l LogStreams) Follow(ctx context.Context, name string, offset int64, take func([]byte) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err := ask(ctx, func(ctx context.Context) (metadata.MD, error) {
		stream, err := l.streams.Read(ctx, &bytestream.ReadRequest{ResourceName: name, ReadOffset: offset})
		if err != nil {
			return nil, err //nolint:wrapcheck // Follow does
		}
		for {
			msg, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return nil, nil
			}
			if err != nil {
				return stream.Trailer(), err //nolint:wrapcheck // Follow does
			}
			if err := take(msg.GetData()); err != nil {
				return nil, err //nolint:wrapcheck // the caller's own
			}
		}
	})
	if err != nil {
		return fmt.Errorf("read log stream %s: %w", name, err)
	}
	return nil
}

// ask makes a call, of each server until one does not say that the stream is
// elsewhere.
func ask(ctx context.Context, call func(context.Context) (trailer metadata.MD, err error)) error {
	for n := 1; ; n++ {
		trailer, err := call(ctx)
		if status.Code(err) != codes.NotFound || n >= wire.LogStreamAttempts || ctx.Err() != nil ||
			!slices.Contains(trailer.Get(wire.LogStreamTrailer), wire.LogStreamElsewhere) {
			return fromStatus(err)
		}
	}
}
