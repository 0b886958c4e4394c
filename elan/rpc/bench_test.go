package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

// bare is a ByteStream that does nothing but move messages: what gRPC itself
// takes on this machine, by which the figures of the others are to be read.
type bare struct {
	bytestream.UnimplementedByteStreamServer
}

func (*bare) Read(req *bytestream.ReadRequest, stream bytestream.ByteStream_ReadServer) error {
	msg := &bytestream.ReadResponse{Data: make([]byte, 1<<20)}
	for n := req.ReadLimit; n > 0; n -= 1 << 20 {
		if err := stream.Send(msg); err != nil {
			return err
		}
	}
	return nil
}

func (*bare) Write(stream bytestream.ByteStream_WriteServer) error {
	n := int64(0)
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&bytestream.WriteResponse{CommittedSize: n})
		}
		if err != nil {
			return err
		}
		n += int64(len(req.Data))
	}
}

// dialTCP serves on loopback TCP and returns a connection.
func dialTCP(b *testing.B, register func(*grpc.Server)) *grpc.ClientConn {
	b.Helper()
	l, err := new(net.ListenConfig).Listen(b.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	g, _ := rpc.NewServer()
	register(g)
	done := make(chan error)
	go func() { done <- g.Serve(l) }()
	conn, err := client.Dial(b.Context(), l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = conn.Close()
		g.Stop()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
	return conn
}

// serve serves elan's services over a store in memory.
func serve(b *testing.B) (*grpc.ClientConn, *mem.Store) {
	b.Helper()
	store, err := mem.New(mem.Options{})
	if err != nil {
		b.Fatal(err)
	}
	actions, err := action.New(action.Options{Store: store, Entries: store})
	if err != nil {
		b.Fatal(err)
	}
	return dialTCP(b, func(g *grpc.Server) {
		if err := rpc.Register(g, rpc.Options{Store: store, Actions: actions}); err != nil {
			b.Fatal(err)
		}
	}), store
}

const benchBytes = 64 << 20

func readAll(ctx context.Context, c bytestream.ByteStreamClient, req *bytestream.ReadRequest) (n int, err error) {
	stream, err := c.Read(ctx, req)
	if err != nil {
		return 0, err
	}
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		n += len(msg.Data)
	}
}

func writeAll(ctx context.Context, c bytestream.ByteStreamClient, name string, data []byte, chunk int) (int64, error) {
	stream, err := c.Write(ctx)
	if err != nil {
		return 0, err
	}
	for off := 0; off < len(data); off += chunk {
		end := min(off+chunk, len(data))
		err := stream.Send(&bytestream.WriteRequest{ResourceName: name, WriteOffset: int64(off), Data: data[off:end], FinishWrite: end == len(data)})
		if err != nil {
			break
		}
		name = ""
	}
	resp, err := stream.CloseAndRecv()
	return resp.GetCommittedSize(), err
}

func BenchmarkRead(b *testing.B) {
	run := func(b *testing.B, conn *grpc.ClientConn, req *bytestream.ReadRequest) {
		b.SetBytes(benchBytes)
		b.ReportAllocs()
		for b.Loop() {
			if n, err := readAll(b.Context(), bytestream.NewByteStreamClient(conn), req); err != nil || n != benchBytes {
				b.Fatal(n, err)
			}
		}
	}
	b.Run("bare", func(b *testing.B) {
		conn := dialTCP(b, func(g *grpc.Server) { bytestream.RegisterByteStreamServer(g, &bare{}) })
		run(b, conn, &bytestream.ReadRequest{ReadLimit: benchBytes})
	})
	b.Run("elan", func(b *testing.B) {
		conn, store := serve(b)
		d, err := blob.PutBytes(b.Context(), store, digest.SHA256, pattern(benchBytes))
		if err != nil {
			b.Fatal(err)
		}
		run(b, conn, &bytestream.ReadRequest{ResourceName: "blobs/" + d.String()})
	})
}

func BenchmarkWrite(b *testing.B) {
	data := pattern(benchBytes)
	d := of(data)
	run := func(b *testing.B, conn *grpc.ClientConn, chunk int) {
		b.SetBytes(benchBytes)
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			// The blob differs each time, or it would be there already.
			b.StopTimer()
			data[0], data[1], data[2] = byte(i), byte(i>>8), byte(i>>16)
			d = of(data)
			i++
			b.StartTimer()
			n, err := writeAll(b.Context(), bytestream.NewByteStreamClient(conn), "uploads/u/blobs/"+d.String(), data, chunk)
			if err != nil || n != benchBytes {
				b.Fatal(n, err)
			}
		}
	}
	for _, chunk := range []int{16 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("bare/%dKiB", chunk>>10), func(b *testing.B) {
			run(b, dialTCP(b, func(g *grpc.Server) { bytestream.RegisterByteStreamServer(g, &bare{}) }), chunk)
		})
		b.Run(fmt.Sprintf("elan/%dKiB", chunk>>10), func(b *testing.B) {
			actions, store := discardingStore(b)
			run(b, dialTCP(b, func(g *grpc.Server) {
				if err := rpc.Register(g, rpc.Options{Store: store, Actions: actions}); err != nil {
					b.Fatal(err)
				}
			}), chunk)
		})
	}
}

// discarding is a store that keeps nothing, so that only receiving is measured.
type discarding struct{ blob.Store }

func (discarding) Create(context.Context, digest.Digest) (blob.Writer, error) { return nowhere{}, nil }

type nowhere struct{}

func (nowhere) Write(p []byte) (int, error) { return len(p), nil }
func (nowhere) Commit() error               { return nil }
func (nowhere) Close() error                { return nil }

func discardingStore(b *testing.B) (*action.Cache, blob.Store) {
	b.Helper()
	store, err := mem.New(mem.Options{})
	if err != nil {
		b.Fatal(err)
	}
	actions, err := action.New(action.Options{Store: store, Entries: store})
	if err != nil {
		b.Fatal(err)
	}
	return actions, discarding{store}
}

func BenchmarkUnary(b *testing.B) {
	conn, store := serve(b)
	cas, actions := repb.NewContentAddressableStorageClient(conn), repb.NewActionCacheClient(conn)
	b.Run("Capabilities", func(b *testing.B) {
		c := repb.NewCapabilitiesClient(conn)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := c.GetCapabilities(b.Context(), &repb.GetCapabilitiesRequest{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("FindMissing1000", func(b *testing.B) {
		req := &repb.FindMissingBlobsRequest{}
		for i := range 1000 {
			d := of(fmt.Append(nil, i))
			if i%2 == 0 {
				if _, err := blob.PutBytes(b.Context(), store, digest.SHA256, fmt.Append(nil, i)); err != nil {
					b.Fatal(err)
				}
			}
			req.BlobDigests = append(req.BlobDigests, d.Proto())
		}
		b.ReportAllocs()
		for b.Loop() {
			if _, err := cas.FindMissingBlobs(b.Context(), req); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("BatchUpdate100x4KiB", func(b *testing.B) {
		req := &repb.BatchUpdateBlobsRequest{}
		for i := range 100 {
			data := pattern(4096 + i)
			req.Requests = append(req.Requests, &repb.BatchUpdateBlobsRequest_Request{Digest: of(data).Proto(), Data: data})
		}
		b.SetBytes(100 * 4096)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := cas.BatchUpdateBlobs(b.Context(), req); err != nil {
				b.Fatal(err)
			}
		}
	})
	for _, compressor := range []repb.Compressor_Value{repb.Compressor_IDENTITY, repb.Compressor_ZSTD} {
		b.Run(fmt.Sprintf("BatchRead100x4KiB/%v", compressor), func(b *testing.B) {
			req := &repb.BatchReadBlobsRequest{AcceptableCompressors: []repb.Compressor_Value{compressor}}
			for i := range 100 {
				d, err := blob.PutBytes(b.Context(), store, digest.SHA256, sources(4096+i))
				if err != nil {
					b.Fatal(err)
				}
				req.Digests = append(req.Digests, d.Proto())
			}
			b.SetBytes(100 * 4096)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := cas.BatchReadBlobs(b.Context(), req); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("GetActionResult", func(b *testing.B) {
		out, err := blob.PutBytes(b.Context(), store, digest.SHA256, []byte("out"))
		if err != nil {
			b.Fatal(err)
		}
		ad := of([]byte("action")).Proto()
		r := &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "out", Digest: out.Proto()}}}
		if _, err := actions.UpdateActionResult(b.Context(), &repb.UpdateActionResultRequest{ActionDigest: ad, ActionResult: r}); err != nil {
			b.Fatal(err)
		}
		b.ReportAllocs()
		for b.Loop() {
			if _, err := actions.GetActionResult(b.Context(), &repb.GetActionResultRequest{ActionDigest: ad}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
