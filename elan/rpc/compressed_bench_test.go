package rpc_test

import (
	"fmt"
	"testing"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

// sources is n bytes that compress well, like much of what builds make.
func sources(n int) []byte {
	noise := pattern(n)
	b := make([]byte, 0, n+100)
	for i := 0; len(b) < n; i += 4 {
		b = fmt.Appendf(b, "\tif err := f%d(ctx, x[%d]); err != nil {\n\t\treturn nil, err\n\t}\n", noise[i%n], noise[(i+1)%n])
	}
	return b[:n]
}

// benchBlobs are what is streamed: bytes that do not compress, and that do.
func benchBlobs() map[string][]byte {
	return map[string][]byte{"random": pattern(benchBytes), "sources": sources(benchBytes)}
}

// BenchmarkReadCompressed is BenchmarkRead of compressed blobs. The client only
// counts the bytes. MB/s are of the blob.
func BenchmarkReadCompressed(b *testing.B) {
	for kind, data := range benchBlobs() {
		b.Run(kind, func(b *testing.B) {
			conn, store := serve(b)
			d, err := blob.PutBytes(b.Context(), store, digest.SHA256, data)
			if err != nil {
				b.Fatal(err)
			}
			req := &bytestream.ReadRequest{ResourceName: "compressed-blobs/zstd/" + d.String()}
			b.SetBytes(benchBytes)
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				if n, err = readAll(b.Context(), bytestream.NewByteStreamClient(conn), req); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n)/benchBytes, "ratio")
		})
	}
}

// BenchmarkWriteCompressed is BenchmarkWrite of compressed blobs. That the
// client compresses them is not measured.
func BenchmarkWriteCompressed(b *testing.B) {
	for kind, data := range benchBlobs() {
		for _, chunk := range []int{16 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("%s/%dKiB", kind, chunk>>10), func(b *testing.B) {
				actions, store := discardingStore(b)
				conn := dialTCP(b, func(g *grpc.Server) {
					if err := rpc.Register(g, rpc.Options{Store: store, Actions: actions}); err != nil {
						b.Fatal(err)
					}
				})
				// The store keeps nothing, so that it may be the same blob each time.
				name, z := compressedName(of(data)), pack(b, data)
				b.SetBytes(benchBytes)
				b.ReportAllocs()
				for b.Loop() {
					n, err := writeAll(b.Context(), bytestream.NewByteStreamClient(conn), name, z, chunk)
					if err != nil || n != int64(len(z)) {
						b.Fatal(n, err)
					}
				}
			})
		}
	}
}
