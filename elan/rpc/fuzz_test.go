package rpc_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	assetpb "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	logpb "github.com/bazelbuild/remote-apis/build/bazel/remote/logstream/v1"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/logstream"
	"github.com/mettle-build/mettle/elan/rpc"
)

// call is a method with the message that it takes and, to begin with, one such.
type call struct {
	method string
	seed   proto.Message
	answer func() proto.Message
}

// calls are all methods that take bytes of clients.
func calls(d *repb.Digest) []call {
	const cas, ac = "/build.bazel.remote.execution.v2.ContentAddressableStorage/", "/build.bazel.remote.execution.v2.ActionCache/"
	name := "blobs/" + d.Hash + "/1"
	instance := "main"
	return []call{
		{cas + "FindMissingBlobs", &repb.FindMissingBlobsRequest{InstanceName: instance, BlobDigests: []*repb.Digest{d}}, func() proto.Message { return &repb.FindMissingBlobsResponse{} }},
		{cas + "BatchUpdateBlobs", &repb.BatchUpdateBlobsRequest{Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: d, Data: []byte("x")}}}, func() proto.Message { return &repb.BatchUpdateBlobsResponse{} }},
		{cas + "BatchReadBlobs", &repb.BatchReadBlobsRequest{Digests: []*repb.Digest{d}, AcceptableCompressors: []repb.Compressor_Value{repb.Compressor_ZSTD}}, func() proto.Message { return &repb.BatchReadBlobsResponse{} }},
		{cas + "GetTree", &repb.GetTreeRequest{RootDigest: d, PageSize: 1, PageToken: "x"}, func() proto.Message { return &repb.GetTreeResponse{} }},
		{cas + "SplitBlob", &repb.SplitBlobRequest{BlobDigest: d}, func() proto.Message { return &repb.SplitBlobResponse{} }},
		{cas + "SpliceBlob", &repb.SpliceBlobRequest{BlobDigest: d, ChunkDigests: []*repb.Digest{d, d}}, func() proto.Message { return &repb.SpliceBlobResponse{} }},
		{ac + "GetActionResult", &repb.GetActionResultRequest{ActionDigest: d, InlineStdout: true, InlineOutputFiles: []string{"a"}}, func() proto.Message { return &repb.ActionResult{} }},
		{ac + "UpdateActionResult", &repb.UpdateActionResultRequest{ActionDigest: d, ActionResult: &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "a", Digest: d}}}}, func() proto.Message { return &repb.ActionResult{} }},
		{"/build.bazel.remote.execution.v2.Capabilities/GetCapabilities", &repb.GetCapabilitiesRequest{InstanceName: instance}, func() proto.Message { return &repb.ServerCapabilities{} }},
		{"/google.bytestream.ByteStream/Read", &bytestream.ReadRequest{ResourceName: name, ReadOffset: 1, ReadLimit: 1}, func() proto.Message { return &bytestream.ReadResponse{} }},
		{"/google.bytestream.ByteStream/Write", &bytestream.WriteRequest{ResourceName: "uploads/u/" + name, FinishWrite: true, Data: []byte("x")}, func() proto.Message { return &bytestream.WriteResponse{} }},
		{"/google.bytestream.ByteStream/Write", &bytestream.WriteRequest{ResourceName: "uploads/u/compressed-" + name, Data: []byte("x")}, func() proto.Message { return &bytestream.WriteResponse{} }},
		{"/google.bytestream.ByteStream/QueryWriteStatus", &bytestream.QueryWriteStatusRequest{ResourceName: "uploads/u/" + name}, func() proto.Message { return &bytestream.QueryWriteStatusResponse{} }},
		{"/build.bazel.remote.logstream.v1.LogStreamService/CreateLogStream", &logpb.CreateLogStreamRequest{Parent: instance}, func() proto.Message { return &logpb.LogStream{} }},
		{"/build.bazel.remote.asset.v1.Fetch/FetchBlob", &assetpb.FetchBlobRequest{Uris: []string{"https://a"}}, func() proto.Message { return &assetpb.FetchBlobResponse{} }},
		{"/build.bazel.remote.asset.v1.Push/PushBlob", &assetpb.PushBlobRequest{Uris: []string{"https://a"}, BlobDigest: d}, func() proto.Message { return &assetpb.PushBlobResponse{} }},
	}
}

// nothingFetched is told of each asset that it is not there, which the answer puts in
// words that depend on the client.
type nothingFetched struct{ fakeAssets }

func (*nothingFetched) FetchBlob(context.Context, asset.Request) (asset.Response, error) {
	return asset.Response{}, &asset.FetchError{Reason: asset.NotFound, Err: errors.New("gone")}
}

// FuzzRequests: whatever a message of a client says, the answer is one, or a status
// that blames the client: nothing breaks, and nothing is said to be our fault, upon
// which clients would try again for ever.
func FuzzRequests(f *testing.F) {
	logs, err := logstream.New(logstream.Options{MaxBytes: 1 << 20})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(logs.Shutdown)
	s := start(f, rpc.Options{Assets: &nothingFetched{}, LogStreams: logs})
	d := digest.Of(digest.SHA256, []byte("x")).Proto()
	all := calls(d)
	for i, c := range all {
		data, err := proto.Marshal(c.seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), data, []byte("\x0a\x07\x0a\x05bazel")) //nolint:gosec // a few
		f.Add(uint8(i), []byte{}, []byte{})                    //nolint:gosec // as above
	}
	f.Fuzz(func(t *testing.T, which uint8, data, md []byte) {
		c := all[int(which)%len(all)]
		req := c.seed.ProtoReflect().New().Interface()
		if proto.Unmarshal(data, req) != nil {
			return // gRPC itself refuses it
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		ctx = metadata.AppendToOutgoingContext(ctx, "build.bazel.remote.execution.v2.requestmetadata-bin", string(md))
		switch err := talk(ctx, s.conn, c, req); status.Code(err) { //nolint:exhaustive // the others blame the client
		case codes.Internal, codes.Unknown, codes.Unavailable, codes.DataLoss:
			t.Errorf("%s with %v: %v", c.method, req, err)
		case codes.DeadlineExceeded:
			t.Errorf("%s with %v takes for ever", c.method, req)
		}
	})
}

// talk sends one message, and reads to the end.
func talk(ctx context.Context, conn *grpc.ClientConn, c call, req proto.Message) error {
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, c.method)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(req); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	for {
		if err := stream.RecvMsg(c.answer()); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}
