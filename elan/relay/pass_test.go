package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/elan/relay"
	"github.com/mettle-build/mettle/elan/wire"
)

// missing is a status with all that a status can have.
func missing(t *testing.T) *gstatus.Status {
	t.Helper()
	st, err := gstatus.New(codes.FailedPrecondition, "a blob is mìssing\n").WithDetails(
		&errdetails.PreconditionFailure{Violations: []*errdetails.PreconditionFailure_Violation{{Type: "MISSING", Subject: "blobs/abc/1"}}},
		&repb.Digest{Hash: "abc", SizeBytes: 1},
	)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// ours are the metadata that tests sent, without what gRPC adds.
func ours(md metadata.MD) map[string][]string {
	got := map[string][]string{}
	for k, vs := range md {
		if k != "content-type" && k != "user-agent" && k[0] != ':' && k != "grpc-accept-encoding" {
			got[k] = vs
		}
	}
	return got
}

// TestRelay_passesAllOn: what goes with a call goes both ways, and a status comes
// back as it is, in unary calls and streams, with and without messages before it.
func TestRelay_passesAllOn(t *testing.T) {
	want := missing(t)
	sent := metadata.Pairs("authorization", "Bearer abc", "traceparent", "00-1-2-03",
		"build.bazel.remote.execution.v2.requestmetadata-bin", "\x00\xff\x01", "x", "1", "x", "2")
	back, last := map[string][]string{"h": {"1", "2"}, "h-bin": {"\x00\xfe"}}, map[string][]string{"t": {"3"}, "t-bin": {"\xff"}}
	type seen struct {
		md       metadata.MD
		deadline time.Time
	}
	calls := make(chan seen, 1)
	see := func(ctx context.Context) {
		md, _ := metadata.FromIncomingContext(ctx)
		end, _ := ctx.Deadline()
		calls <- seen{md, end}
	}
	f := &fake{
		find: func(ctx context.Context, r *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
			see(ctx)
			_ = grpc.SetTrailer(ctx, last)
			if r.InstanceName == "bad" {
				return nil, want.Err()
			}
			return &repb.FindMissingBlobsResponse{}, grpc.SetHeader(ctx, back)
		},
		read: func(r *bytestream.ReadRequest, s bytestream.ByteStream_ReadServer) error {
			see(s.Context())
			s.SetTrailer(last)
			if r.ResourceName != "trailers" {
				if err := s.SetHeader(back); err != nil {
					return err
				}
			}
			for range r.ReadLimit {
				if err := s.Send(&bytestream.ReadResponse{Data: []byte("x")}); err != nil {
					return err
				}
			}
			if r.ResourceName == "good" {
				return nil
			}
			return want.Err()
		},
		write: func(s bytestream.ByteStream_WriteServer) error {
			see(s.Context())
			s.SetTrailer(last)
			if _, err := s.Recv(); err != nil {
				return err
			}
			return want.Err()
		},
	}
	s := relayTo(t, relay.Options{PassCredentials: true}, started(t, f.register))
	read := func(name string, n int64) func(context.Context, ...grpc.CallOption) error {
		return func(ctx context.Context, o ...grpc.CallOption) error {
			stream, err := s.streams.Read(ctx, &bytestream.ReadRequest{ResourceName: name, ReadLimit: n}, o...)
			if err != nil {
				return err
			}
			got := int64(0)
			for ; err == nil; got++ {
				_, err = stream.Recv()
			}
			if got != n+1 {
				t.Errorf("%d messages, want %d", got-1, n)
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
	find := func(instance string) func(context.Context, ...grpc.CallOption) error {
		return func(ctx context.Context, o ...grpc.CallOption) error {
			_, err := s.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{InstanceName: instance}, o...)
			return err
		}
	}
	for _, tc := range []struct {
		name    string
		call    func(ctx context.Context, o ...grpc.CallOption) error
		fails   bool
		headers bool
	}{
		{"unary", find("good"), false, true},
		{"unary that fails", find("bad"), true, false},
		{"empty stream", read("good", 0), false, true},
		{"stream", read("good", 3), false, true},
		{"stream that fails at the end", read("bad", 3), true, true},
		{"stream that fails with headers", read("bad", 0), true, true},
		{"stream that fails with trailers only", read("trailers", 0), true, false},
		{"upload that fails", func(ctx context.Context, o ...grpc.CallOption) error {
			stream, err := s.streams.Write(ctx, o...)
			if err != nil {
				return err
			}
			if err := stream.Send(&bytestream.WriteRequest{ResourceName: "x"}); err != nil {
				return err
			}
			_, err = stream.CloseAndRecv()
			return err
		}, true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			end := time.Now().Add(50 * time.Second)
			ctx, cancel := context.WithDeadline(metadata.NewOutgoingContext(t.Context(), sent), end)
			defer cancel()
			var header, trailer metadata.MD
			err := tc.call(ctx, grpc.Header(&header), grpc.Trailer(&trailer))
			if !tc.fails && err != nil {
				t.Fatal(err)
			}
			if tc.fails {
				if diff := cmp.Diff(want.Proto(), gstatus.Convert(err).Proto(), protocmp.Transform()); diff != "" {
					t.Errorf("status -want +got:\n%s", diff)
				}
			}
			in := receive(t, calls)
			if diff := cmp.Diff(map[string][]string(sent), ours(in.md)); diff != "" {
				t.Errorf("metadata at the storage -want +got:\n%s", diff)
			}
			if d := in.deadline.Sub(end); d < -time.Second || d > time.Second {
				t.Errorf("the storage's deadline is %v off", d)
			}
			wantHeader := map[string][]string{}
			if tc.headers {
				wantHeader = back
			}
			if diff := cmp.Diff(wantHeader, ours(header)); diff != "" {
				t.Errorf("header -want +got:\n%s", diff)
			}
			got := ours(trailer)
			delete(got, "grpc-status-details-bin") // gRPC's own, of which the client sees one
			if diff := cmp.Diff(last, got); diff != "" {
				t.Errorf("trailer -want +got:\n%s", diff)
			}
			if n := len(trailer["grpc-status-details-bin"]); n > 1 {
				t.Errorf("the details are there %d times", n)
			}
		})
	}
}

// TestRelay_clientLeaves: a client that is gone ends the call at the storage, in
// the middle of all kinds of streams.
func TestRelay_clientLeaves(t *testing.T) {
	begun, ended := make(chan struct{}, 1), make(chan error, 1)
	until := func(ctx context.Context) error {
		begun <- struct{}{}
		<-ctx.Done()
		ended <- ctx.Err()
		return ctx.Err()
	}
	f := &fake{
		find: func(ctx context.Context, _ *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
			return nil, until(ctx)
		},
		read: func(_ *bytestream.ReadRequest, s bytestream.ByteStream_ReadServer) error {
			if err := s.Send(&bytestream.ReadResponse{Data: []byte("x")}); err != nil {
				return err
			}
			return until(s.Context())
		},
		write: func(s bytestream.ByteStream_WriteServer) error {
			if _, err := s.Recv(); err != nil {
				return err
			}
			return until(s.Context())
		},
	}
	s := relayTo(t, relay.Options{}, started(t, f.register))
	for name, call := range map[string]func(ctx context.Context) error{
		"unary": func(ctx context.Context) error {
			_, err := s.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{})
			return err
		},
		"read": func(ctx context.Context) error {
			stream, err := s.streams.Read(ctx, &bytestream.ReadRequest{})
			for err == nil {
				_, err = stream.Recv()
			}
			return err
		},
		"write": func(ctx context.Context) error {
			stream, err := s.streams.Write(ctx)
			if err != nil {
				return err
			}
			if err := stream.Send(&bytestream.WriteRequest{ResourceName: "x"}); err != nil {
				return err
			}
			return stream.RecvMsg(&bytestream.WriteResponse{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			result := make(chan error, 1)
			go func() { result <- call(ctx) }()
			receive(t, begun)
			cancel()
			if err := receive(t, ended); !errors.Is(err, context.Canceled) {
				t.Errorf("the storage's context: %v", err)
			}
			if err := receive(t, result); gstatus.Code(err) != codes.Canceled {
				t.Errorf("the client: %v", err)
			}
		})
	}
}

// TestRelay_largeMessages: what a server of ours takes passes, and what is larger
// is refused, without harm to the next call.
func TestRelay_largeMessages(t *testing.T) {
	f := &fake{
		update: func(_ context.Context, r *repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error) {
			// As much comes back.
			return &repb.BatchUpdateBlobsResponse{Responses: []*repb.BatchUpdateBlobsResponse_Response{{
				Status: gstatus.New(codes.OK, string(bytes.Repeat([]byte{'m'}, len(r.Requests[0].Data)))).Proto(),
			}}}, nil
		},
		write: func(s bytestream.ByteStream_WriteServer) error {
			for {
				if _, err := s.Recv(); err != nil {
					return err
				}
			}
		},
	}
	s := relayTo(t, relay.Options{}, started(t, f.register))
	update := func(n int) error {
		_, err := s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{
			Requests: []*repb.BatchUpdateBlobsRequest_Request{{Data: make([]byte, n)}},
		})
		return err
	}
	for range 2 {
		if err := update(15 << 20); err != nil {
			t.Errorf("15 MiB each way: %v", err)
		}
		if err := update(17 << 20); gstatus.Code(err) != codes.ResourceExhausted {
			t.Errorf("17 MiB: %v, want RESOURCE_EXHAUSTED", err)
		}
	}
	stream, err := s.streams.Write(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the first is fine
		if err := stream.Send(&bytestream.WriteRequest{ResourceName: "x", Data: make([]byte, 1000)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.Send(&bytestream.WriteRequest{Data: make([]byte, 17<<20)}); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if err := stream.RecvMsg(&bytestream.WriteResponse{}); gstatus.Code(err) != codes.ResourceExhausted {
		t.Errorf("17 MiB in a stream: %v, want RESOURCE_EXHAUSTED", err)
	}
}

// TestRelay_earlyEnd: a storage that ends an upload early, because it has the blob
// already, is heard while the client sends nothing.
func TestRelay_earlyEnd(t *testing.T) {
	f := &fake{write: func(s bytestream.ByteStream_WriteServer) error {
		if _, err := s.Recv(); err != nil {
			return err
		}
		return s.SendAndClose(&bytestream.WriteResponse{CommittedSize: 1 << 30})
	}}
	s := relayTo(t, relay.Options{}, started(t, f.register))
	stream, err := s.streams.Write(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&bytestream.WriteRequest{ResourceName: "x", Data: make([]byte, 1000)}); err != nil {
		t.Fatal(err)
	}
	resp := &bytestream.WriteResponse{}
	if err := stream.RecvMsg(resp); err != nil || resp.CommittedSize != 1<<30 {
		t.Errorf("%v, %v; want an early end", resp, err)
	}
}

// TestRelay_slowClient: clients that do not read hold up their own streams, at a
// bounded number of bytes, and no others.
func TestRelay_slowClient(t *testing.T) {
	const slow, most = 8, 24 << 20
	produced := make(chan int, slow)
	f := &fake{
		read: func(r *bytestream.ReadRequest, s bytestream.ByteStream_ReadServer) error {
			n := 0
			defer func() {
				if r.ResourceName == "slow" {
					produced <- n
				}
			}()
			for ; n < int(r.ReadLimit); n += 1 << 20 {
				if err := s.Send(&bytestream.ReadResponse{Data: make([]byte, 1<<20)}); err != nil {
					return err
				}
			}
			return nil
		},
	}
	s := relayTo(t, relay.Options{}, started(t, f.register))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range slow {
		stream, err := s.streams.Read(ctx, &bytestream.ReadRequest{ResourceName: "slow", ReadLimit: 1 << 40})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	// While those wait, this one has 40 MiB.
	stream, err := s.streams.Read(t.Context(), &bytestream.ReadRequest{ReadLimit: 40 << 20})
	got := 0
	for err == nil {
		var m *bytestream.ReadResponse
		if m, err = stream.Recv(); err == nil {
			got += len(m.Data)
		}
	}
	if !errors.Is(err, io.EOF) || got != 40<<20 {
		t.Errorf("beside slow clients: %d bytes, %v", got, err)
	}
	cancel()
	for range slow {
		if n := receive(t, produced); n > most {
			t.Errorf("a slow client's storage has sent %d bytes, of which one was read: more than %d", n, most)
		}
	}
}

// TestRelay_keepsCredentials: what a client shows of itself, in whatever header, is not
// for those who may listen on the way to the storage, and gives it nothing there where
// this server calls in its own name.
func TestRelay_keepsCredentials(t *testing.T) {
	got := make(chan metadata.MD, 1)
	f := &fake{}
	f.find = func(ctx context.Context, _ *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		got <- md
		return &repb.FindMissingBlobsResponse{}, nil
	}
	sent := metadata.Pairs("authorization", "Bearer abc", "x-api-key", "k", "cookie", "c", "proxy-authorization", "p", "x-forwarded-client-cert", "By=admin",
		wire.ActsForHeader, "somebody else", "traceparent", "00-1", "build.bazel.remote.execution.v2.requestmetadata-bin", "m")
	caller := ""
	for name, tc := range map[string]struct {
		o      relay.Options
		caller string
		want   []string
	}{
		"in the name of this server": {relay.Options{}, "", []string{"build.bazel.remote.execution.v2.requestmetadata-bin", "traceparent"}},
		"that says whom it is for":   {relay.Options{Caller: func(context.Context) string { return caller }}, "ci", []string{"build.bazel.remote.execution.v2.requestmetadata-bin", "mettle-acts-for-bin", "traceparent"}},
		"that does not know":         {relay.Options{Caller: func(context.Context) string { return caller }}, "", []string{"build.bazel.remote.execution.v2.requestmetadata-bin", "traceparent"}},
		"in the name of the client":  {relay.Options{PassCredentials: true}, "", []string{"authorization", "build.bazel.remote.execution.v2.requestmetadata-bin", "cookie", "proxy-authorization", "traceparent", "x-api-key", "x-forwarded-client-cert"}},
	} {
		t.Run(name, func(t *testing.T) {
			caller = tc.caller
			s := relayTo(t, tc.o, started(t, f.register))
			if _, err := s.cas.FindMissingBlobs(metadata.NewOutgoingContext(t.Context(), sent), &repb.FindMissingBlobsRequest{}); err != nil {
				t.Fatal(err)
			}
			md := ours(receive(t, got))
			if diff := cmp.Diff(tc.want, slices.Sorted(maps.Keys(md))); diff != "" {
				t.Errorf("metadata at the storage (-want +got):\n%s", diff)
			}
			if tc.caller != "" && !slices.Equal(md[wire.ActsForHeader], []string{tc.caller}) {
				t.Errorf("the call is for %q, want %q", md[wire.ActsForHeader], tc.caller)
			}
		})
	}
}
