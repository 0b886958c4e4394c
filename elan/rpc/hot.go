package rpc

import (
	"context"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
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

// byteStreamService is what the generated code registers with a *grpc.Server alone.
func byteStreamService() *grpc.ServiceDesc {
	return &grpc.ServiceDesc{
		ServiceName: "google.bytestream.ByteStream",
		HandlerType: (*bytestream.ByteStreamServer)(nil),
		Methods: []grpc.MethodDesc{{
			MethodName: "QueryWriteStatus",
			Handler:    handler("/google.bytestream.ByteStream/QueryWriteStatus", (*byteStreamServer).QueryWriteStatus),
		}},
		Streams: []grpc.StreamDesc{
			{StreamName: "Read", ServerStreams: true, Handler: func(srv any, ss grpc.ServerStream) error {
				req := &bytestream.ReadRequest{}
				if err := ss.RecvMsg(req); err != nil {
					return err //nolint:wrapcheck // a status already
				}
				return srv.(bytestream.ByteStreamServer).Read(req, &grpc.GenericServerStream[bytestream.ReadRequest, bytestream.ReadResponse]{ServerStream: ss}) //nolint:forcetypeassert // gRPC has checked it
			}},
			{StreamName: "Write", ClientStreams: true, Handler: func(srv any, ss grpc.ServerStream) error {
				return srv.(bytestream.ByteStreamServer).Write(&grpc.GenericServerStream[bytestream.WriteRequest, bytestream.WriteResponse]{ServerStream: ss}) //nolint:forcetypeassert // as above
			}},
		},
		Metadata: "google/bytestream/bytestream.proto",
	}
}
