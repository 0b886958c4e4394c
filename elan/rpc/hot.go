package rpc

import (
	"context"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
)

// casService is the ContentAddressableStorage with the messages of elan/wire for
// the calls that bring thousands of digests or megabytes of blobs.
func casService() *grpc.ServiceDesc {
	d := repb.ContentAddressableStorage_ServiceDesc
	d.Methods = slices.Clone(d.Methods)
	for i := range d.Methods {
		switch m := &d.Methods[i]; m.MethodName {
		case "FindMissingBlobs":
			m.Handler = handler(repb.ContentAddressableStorage_FindMissingBlobs_FullMethodName, (*casServer).findMissingBlobs)
		case "BatchUpdateBlobs":
			m.Handler = handler(repb.ContentAddressableStorage_BatchUpdateBlobs_FullMethodName, (*casServer).batchUpdateBlobs)
		case "BatchReadBlobs":
			m.Handler = handler(repb.ContentAddressableStorage_BatchReadBlobs_FullMethodName, (*casServer).batchReadBlobs)
		}
	}
	return &d
}

// handler is what the generated code has for a call, for other messages. It frees
// the request, where that is to be freed, when the call is over.
func handler[S, Req, Resp any](name string, call func(S, context.Context, *Req) (*Resp, error)) grpc.MethodHandler {
	return func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		req := new(Req)
		if err := decode(req); err != nil {
			return nil, err
		}
		if f, ok := any(req).(interface{ Free() }); ok {
			defer f.Free()
		}
		server := srv.(S) //nolint:forcetypeassert // gRPC has checked it
		if interceptor == nil {
			return call(server, ctx, req)
		}
		info := &grpc.UnaryServerInfo{Server: srv, FullMethod: name}
		return interceptor(ctx, req, info, func(ctx context.Context, _ any) (any, error) { return call(server, ctx, req) })
	}
}
