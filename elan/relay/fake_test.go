package relay_test

import (
	"context"
	"testing"

	assetpb "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
)

// fake is a storage whose calls do what a test says.
type fake struct {
	repb.UnimplementedContentAddressableStorageServer
	repb.UnimplementedCapabilitiesServer
	bytestream.UnimplementedByteStreamServer
	assetpb.UnimplementedFetchServer

	find         func(context.Context, *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error)
	update       func(context.Context, *repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error)
	read         func(*bytestream.ReadRequest, bytestream.ByteStream_ReadServer) error
	write        func(bytestream.ByteStream_WriteServer) error
	fetch        func(context.Context, *assetpb.FetchBlobRequest) (*assetpb.FetchBlobResponse, error)
	capabilities func(context.Context, *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error)
}

func (f *fake) register(s *grpc.Server) {
	repb.RegisterContentAddressableStorageServer(s, f)
	repb.RegisterCapabilitiesServer(s, f)
	bytestream.RegisterByteStreamServer(s, f)
	assetpb.RegisterFetchServer(s, f)
}

func (f *fake) FindMissingBlobs(ctx context.Context, r *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
	return f.find(ctx, r)
}

func (f *fake) BatchUpdateBlobs(ctx context.Context, r *repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error) {
	return f.update(ctx, r)
}

func (f *fake) Read(r *bytestream.ReadRequest, s bytestream.ByteStream_ReadServer) error {
	return f.read(r, s)
}
func (f *fake) Write(s bytestream.ByteStream_WriteServer) error { return f.write(s) }

func (f *fake) FetchBlob(ctx context.Context, r *assetpb.FetchBlobRequest) (*assetpb.FetchBlobResponse, error) {
	return f.fetch(ctx, r)
}

func (f *fake) GetCapabilities(ctx context.Context, r *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
	return f.capabilities(ctx, r)
}

// receive waits for a value that a call sends.
func receive[T any](t *testing.T, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-t.Context().Done():
		t.Fatal("the test ended first")
		panic("unreachable")
	}
}
