package rpc_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	logpb "github.com/bazelbuild/remote-apis/build/bazel/remote/logstream/v1"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/logstream"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/elan/wire"
)

// startLogs starts a server with log streams, and makes one.
func startLogs(t *testing.T, o logstream.Options) (*server, *logpb.LogStream) {
	t.Helper()
	logs, err := logstream.New(o)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, rpc.Options{LogStreams: logs})
	t.Cleanup(logs.Shutdown) // first, so that calls end
	made, err := logpb.NewLogStreamServiceClient(s.conn).CreateLogStream(t.Context(), &logpb.CreateLogStreamRequest{Parent: "main/x"})
	if err != nil {
		t.Fatal(err)
	}
	return s, made
}

// readLog reads a stream to its end.
func (s *server) readLog(ctx context.Context, req *bytestream.ReadRequest) (string, error) {
	stream, err := s.streams.Read(ctx, req)
	if err != nil {
		return "", err
	}
	var all strings.Builder
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return all.String(), nil
		}
		if err != nil {
			return all.String(), err
		}
		all.Write(msg.Data)
	}
}

// The flow that the LogStream API describes: bytes can be read as soon as they are
// written, long before the end.
func TestLogStream_follow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, log := startLogs(t, logstream.Options{})
		if !strings.HasPrefix(log.Name, "main/x/logstreams/") || !strings.HasPrefix(log.WriteResourceName, log.Name+"/") {
			t.Fatalf("names %q, %q", log.Name, log.WriteResourceName)
		}
		reader, err := s.streams.Read(t.Context(), &bytestream.ReadRequest{ResourceName: log.Name})
		if err != nil {
			t.Fatal(err)
		}
		want := func(want string) {
			t.Helper()
			msg, err := reader.Recv()
			if err != nil || string(msg.Data) != want {
				t.Fatalf("%q, %v, want %q", msg.GetData(), err, want)
			}
		}
		// By one long call, in which the writer is silent for a while,
		writer, err := s.streams.Write(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := writer.Send(&bytestream.WriteRequest{ResourceName: log.WriteResourceName, Data: []byte("one ")}); err != nil {
			t.Fatal(err)
		}
		want("one ")
		time.Sleep(2 * time.Hour)
		if err := writer.Send(&bytestream.WriteRequest{WriteOffset: 4, Data: []byte("two ")}); err != nil {
			t.Fatal(err)
		}
		want("two ")
		if resp, err := writer.CloseAndRecv(); err != nil || resp.CommittedSize != 8 {
			t.Fatalf("%v, %v, want 8 bytes", resp, err)
		}
		// and by others.
		if n, err := s.write(t.Context(), &bytestream.WriteRequest{ResourceName: log.WriteResourceName, WriteOffset: 8, Data: []byte("three")}); err != nil || n != 13 {
			t.Fatalf("%d, %v, want 13", n, err)
		}
		want("three")
		status, err := s.streams.QueryWriteStatus(t.Context(), &bytestream.QueryWriteStatusRequest{ResourceName: log.WriteResourceName})
		if err != nil || status.CommittedSize != 13 || status.Complete {
			t.Errorf("status %v, %v", status, err)
		}
		last := &bytestream.WriteRequest{ResourceName: log.WriteResourceName, WriteOffset: 13, Data: []byte("."), FinishWrite: true}
		for range 2 { // the first answer may have been lost
			if n, err := s.write(t.Context(), last); err != nil || n != 14 {
				t.Fatalf("the end: %d, %v, want 14", n, err)
			}
		}
		want(".")
		if _, err := reader.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %v, want EOF", err)
		}
		for _, tc := range []struct {
			offset, limit int64
			want          string
		}{{0, 0, "one two three."}, {4, 0, "two three."}, {4, 5, "two t"}, {14, 0, ""}, {4, 100, "two three."}} {
			got, err := s.readLog(t.Context(), &bytestream.ReadRequest{ResourceName: log.Name, ReadOffset: tc.offset, ReadLimit: tc.limit})
			if err != nil || got != tc.want {
				t.Errorf("from %d, %d bytes: %q, %v, want %q", tc.offset, tc.limit, got, err, tc.want)
			}
		}
		if s.store.finds > 0 {
			t.Errorf("the store was asked %d times", s.store.finds)
		}
	})
}

// Large ones go in messages that every client takes.
func TestLogStream_large(t *testing.T) {
	s, log := startLogs(t, logstream.Options{})
	data := string(pattern(3 << 20))
	if n, err := s.write(t.Context(), chunks(log.WriteResourceName, []byte(data), 700_000)...); err != nil || n != int64(len(data)) {
		t.Fatal(n, err)
	}
	if got, err := s.readLog(t.Context(), &bytestream.ReadRequest{ResourceName: log.Name}); err != nil || got != data {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestLogStream_errors(t *testing.T) {
	s, log := startLogs(t, logstream.Options{MaxStreamBytes: 10})
	read := func(name string, offset, limit int64) func() (metadata.MD, error) {
		return func() (metadata.MD, error) {
			stream, err := s.streams.Read(t.Context(), &bytestream.ReadRequest{ResourceName: name, ReadOffset: offset, ReadLimit: limit})
			if err == nil {
				_, err = stream.Recv()
			}
			return stream.Trailer(), err
		}
	}
	write := func(msgs ...*bytestream.WriteRequest) func() (metadata.MD, error) {
		return func() (metadata.MD, error) {
			stream, err := s.streams.Write(t.Context())
			for _, m := range msgs {
				if err == nil {
					_ = stream.Send(m) // the answer tells
				}
			}
			if err == nil {
				_, err = stream.CloseAndRecv()
			}
			return stream.Trailer(), err
		}
	}
	query := func(name string) func() (metadata.MD, error) {
		return func() (md metadata.MD, err error) {
			_, err = s.streams.QueryWriteStatus(t.Context(), &bytestream.QueryWriteStatusRequest{ResourceName: name}, grpc.Trailer(&md))
			return md, err
		}
	}
	const foreign = "main/x/logstreams/AAAAAAAA-BBBBBBBBBBBBBBBBBBBBBBBBBB"
	for _, tc := range []struct {
		name      string
		call      func() (metadata.MD, error)
		want      codes.Code
		elsewhere bool
	}{
		{name: "read by the writer's name", call: read(log.WriteResourceName, 0, 0), want: codes.InvalidArgument},
		{name: "write by the readers' name", call: write(&bytestream.WriteRequest{ResourceName: log.Name}), want: codes.InvalidArgument},
		{name: "read another server's", call: read(foreign, 0, 0), want: codes.NotFound, elsewhere: true},
		{name: "write to another server's", call: write(&bytestream.WriteRequest{ResourceName: foreign + "/C"}), want: codes.NotFound, elsewhere: true},
		{name: "query another server's", call: query(foreign + "/C"), want: codes.NotFound, elsewhere: true},
		{name: "read what never was", call: read(log.Name[:len(log.Name)-1], 0, 0), want: codes.NotFound},
		{name: "query with a wrong token", call: query(log.Name + "/C"), want: codes.NotFound},
		{name: "negative limit", call: read(log.Name, 0, -1), want: codes.InvalidArgument},
		{name: "negative offset", call: read(log.Name, -1, 0), want: codes.OutOfRange},
		{name: "write leaving a gap", call: write(&bytestream.WriteRequest{ResourceName: log.WriteResourceName, WriteOffset: 1, Data: []byte("x")}), want: codes.OutOfRange},
		{
			name: "another name within a call",
			call: write(&bytestream.WriteRequest{ResourceName: log.WriteResourceName}, &bytestream.WriteRequest{ResourceName: foreign}), want: codes.InvalidArgument,
		},
		{
			name: "more than there may be",
			call: write(&bytestream.WriteRequest{ResourceName: log.WriteResourceName, Data: make([]byte, 11)}), want: codes.ResourceExhausted,
		},
		{name: "read after that", call: read(log.Name, 0, 0), want: codes.ResourceExhausted},
	} {
		md, err := tc.call()
		if gstatus.Code(err) != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
		if got := len(md.Get(wire.LogStreamTrailer)) > 0; got != tc.elsewhere {
			t.Errorf("%s: trailer %v, want one: %v", tc.name, md, tc.elsewhere)
		}
	}
	logs := logpb.NewLogStreamServiceClient(s.conn)
	if _, err := logs.CreateLogStream(t.Context(), &logpb.CreateLogStreamRequest{Parent: "a/uploads"}); gstatus.Code(err) != codes.InvalidArgument {
		t.Errorf("a parent that is no instance: %v", err)
	}
}

// A server without them says that these are no names that it knows.
func TestLogStream_notServed(t *testing.T) {
	s := start(t, rpc.Options{})
	if _, err := s.readLog(t.Context(), &bytestream.ReadRequest{ResourceName: "logstreams/A-B"}); gstatus.Code(err) != codes.InvalidArgument {
		t.Errorf("read: %v", err)
	}
	logs := logpb.NewLogStreamServiceClient(s.conn)
	if _, err := logs.CreateLogStream(t.Context(), &logpb.CreateLogStreamRequest{}); gstatus.Code(err) != codes.Unimplemented {
		t.Errorf("create: %v", err)
	}
}
