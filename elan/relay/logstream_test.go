package relay_test

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/logstream"
	"github.com/mettle-build/mettle/elan/relay"
	"github.com/mettle-build/mettle/elan/wire"
)

// A log stream that one server has not is asked for again, as its trailer says, until
// another one has it; what it has not said so of is not.
func TestRelay_logStreamElsewhere(t *testing.T) {
	elsewhere := metadata.Pairs(wire.LogStreamTrailer, wire.LogStreamElsewhere)
	for _, tc := range []struct {
		name     string
		has      int64 // the call that finds it
		trailer  metadata.MD
		calls    int64
		wantCode codes.Code
	}{
		{"the third has it", 3, elsewhere, 3, codes.OK},
		{"nobody has it", 1000, elsewhere, wire.LogStreamAttempts, codes.NotFound},
		{"a blob that is not there", 3, nil, 1, codes.NotFound},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var calls atomic.Int64
			answer := func(set func(metadata.MD)) error {
				if calls.Add(1) >= tc.has {
					return nil
				}
				set(tc.trailer)
				return gstatus.Error(codes.NotFound, "not here")
			}
			f := &fake{
				read: func(_ *bytestream.ReadRequest, s bytestream.ByteStream_ReadServer) error { return answer(s.SetTrailer) },
				write: func(s bytestream.ByteStream_WriteServer) error {
					if _, err := s.Recv(); err != nil {
						return err
					}
					if err := answer(s.SetTrailer); err != nil {
						return err
					}
					return s.SendAndClose(&bytestream.WriteResponse{CommittedSize: 1})
				},
			}
			c := relayTo(t, relay.Options{}, started(t, f.register))
			check := func(what string, err error) {
				t.Helper()
				if gstatus.Code(err) != tc.wantCode || calls.Swap(0) != tc.calls {
					t.Errorf("%s: %v, want %v after %d calls", what, err, tc.wantCode, tc.calls)
				}
			}
			streams := c.streams
			r, err := streams.Read(t.Context(), &bytestream.ReadRequest{ResourceName: "logstreams/A-B"})
			if err == nil {
				if _, err = r.Recv(); errors.Is(err, io.EOF) {
					err = nil
				}
			}
			check("read", err)
			w, err := streams.Write(t.Context())
			if err == nil {
				_ = w.Send(&bytestream.WriteRequest{ResourceName: "logstreams/A-B/C", Data: []byte("x")}) // the answer tells
				_, err = w.CloseAndRecv()
			}
			check("write", err)
		})
	}
}

// Who follows a log stream is sent away at the end of the server, and who reads a
// blob is not.
func TestRelay_Shutdown(t *testing.T) {
	begun, goOn := make(chan struct{}, 2), make(chan struct{})
	f := &fake{read: func(req *bytestream.ReadRequest, s bytestream.ByteStream_ReadServer) error {
		if err := s.Send(&bytestream.ReadResponse{Data: []byte("x")}); err != nil {
			return err
		}
		begun <- struct{}{}
		if req.ResourceName == "blobs/x/1" {
			<-goOn
			return nil
		}
		<-s.Context().Done()
		return s.Context().Err()
	}}
	c := relayTo(t, relay.Options{}, started(t, f.register))
	r, streams := c.relay, c.streams
	var reads []bytestream.ByteStream_ReadClient
	for _, name := range []string{"i/logstreams/A-B", "blobs/x/1"} {
		s, err := streams.Read(t.Context(), &bytestream.ReadRequest{ResourceName: name})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		reads = append(reads, s)
		receive(t, begun)
	}
	r.Shutdown()
	r.Shutdown()
	if _, err := reads[0].Recv(); gstatus.Code(err) != codes.Unavailable {
		t.Errorf("the log stream: %v, want UNAVAILABLE", err)
	}
	close(goOn)
	if _, err := reads[1].Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("the blob: %v, want its end", err)
	}
	s, err := streams.Read(t.Context(), &bytestream.ReadRequest{ResourceName: "logstreams/A-B"})
	if err == nil {
		for err == nil {
			_, err = s.Recv()
		}
	}
	if gstatus.Code(err) != codes.Unavailable {
		t.Errorf("another log stream: %v, want UNAVAILABLE", err)
	}
}

// Streams are found on whichever storage server they are, through a relay and without.
func TestRelay_logStreams(t *testing.T) {
	var targets []string
	var backends []*backend
	for range 3 {
		logs, err := logstream.New(logstream.Options{})
		if err != nil {
			t.Fatal(err)
		}
		b := started(t, elanWith(t, logs))
		t.Cleanup(logs.Shutdown)
		backends = append(backends, b)
		targets = append(targets, b.addr)
	}
	c := relayTo(t, relay.Options{}, backends...)
	for name, conn := range map[string]*grpc.ClientConn{"relayed": c.conn, "direct": connect(t, targets)} {
		t.Run(name, func(t *testing.T) {
			storage, err := client.New(client.Options{Conn: conn})
			if err != nil {
				t.Fatal(err)
			}
			logs := storage.LogStreams()
			name, writeName, err := logs.Create(t.Context(), "i")
			if err != nil {
				t.Fatal(err)
			}
			if n, err := logs.Append(t.Context(), writeName, 0, []byte("begun ")); n != 6 || err != nil {
				t.Fatal(n, err)
			}
			var got string
			if err := logs.Follow(t.Context(), name, 0, func(p []byte) error {
				if got += string(p); got != "begun " {
					return nil
				}
				// It is read before it ends.
				if n, err := logs.Append(t.Context(), writeName, 6, []byte("ended")); n != 11 || err != nil {
					t.Error(n, err)
				}
				return logs.Finish(t.Context(), writeName, 11)
			}); err != nil || got != "begun ended" {
				t.Errorf("read %q, %v", got, err)
			}
			if n, ended, err := logs.Status(t.Context(), writeName); n != 11 || !ended || err != nil {
				t.Errorf("status: %d, %v, %v", n, ended, err)
			}
			for _, gone := range []string{"i/logstreams/AAAAAAAA-B", "i/logstreams/AAAAAAAA-B/C"} {
				_, err := logs.Append(t.Context(), gone, 0, []byte("x"))
				if err == nil {
					t.Errorf("%s was written to", gone)
				}
			}
		})
	}
}

// Whoever writes a log stream may be silent, and nobody else.
func TestRelay_Patient(t *testing.T) {
	for _, tc := range []struct {
		name    string
		patient int32
	}{
		{"i/logstreams/AAAAAAAA-B/C", 1},
		{"logstreams/AAAAAAAA-B/C", 1},
		{"i/uploads/0b1c2d3e/blobs/e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855/0", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := started(t, (&fake{write: func(s bytestream.ByteStream_WriteServer) error {
				for {
					if _, err := s.Recv(); errors.Is(err, io.EOF) {
						return s.SendAndClose(&bytestream.WriteResponse{})
					} else if err != nil {
						return err
					}
				}
			}}).register)
			var patient atomic.Int32
			c := relayTo(t, relay.Options{Patient: func(context.Context) { patient.Add(1) }}, b)
			w, err := c.streams.Write(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := w.Send(&bytestream.WriteRequest{ResourceName: tc.name}); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := w.CloseAndRecv(); err != nil {
				t.Fatal(err)
			}
			if n := patient.Load(); n != tc.patient {
				t.Errorf("asked for patience %d times, want %d", n, tc.patient)
			}
		})
	}
}
