package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/compress"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
)

func TestClient_compressed(t *testing.T) {
	blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store {
		return newClient(t, client.Options{Conn: start(t, register), Instance: "some/instance", CompressFrom: 1})
	}})
}

func TestClient_compressed_small_chunks(t *testing.T) {
	blobtest.Run(t, blobtest.Options{LargeBytes: 100_001, New: func(t testing.TB) blob.Store {
		return newClient(t, client.Options{Conn: start(t, register), ChunkBytes: 1000, CompressFrom: 2000})
	}})
}

// remote is a server that keeps one blob's bytes as they came or are to go, and
// commits what it is told.
type remote struct {
	repb.UnimplementedCapabilitiesServer
	bytestream.UnimplementedByteStreamServer
	compressors []repb.Compressor_Value
	capsErr     error
	committed   func(received int64) int64
	early       bool // end a Write after its first message
	data        []byte

	asked atomic.Int32 // for capabilities
	name  atomic.Value // of the last resource
}

func (r *remote) GetCapabilities(context.Context, *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
	if r.asked.Add(1); r.capsErr != nil {
		return nil, r.capsErr
	}
	return &repb.ServerCapabilities{CacheCapabilities: &repb.CacheCapabilities{SupportedCompressors: r.compressors}}, nil
}

func (r *remote) Write(stream bytestream.ByteStream_WriteServer) error {
	received := int64(0)
	for first := true; ; first = false {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		if first {
			r.name.Store(req.ResourceName)
		}
		received += int64(len(req.Data))
		if req.FinishWrite || r.early {
			return stream.SendAndClose(&bytestream.WriteResponse{CommittedSize: r.committed(received)})
		}
	}
}

func (r *remote) Read(req *bytestream.ReadRequest, stream bytestream.ByteStream_ReadServer) error {
	r.name.Store(req.ResourceName)
	for data := r.data; len(data) > 0; {
		n := min(len(data), 100_000)
		if err := stream.Send(&bytestream.ReadResponse{Data: data[:n]}); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

func (r *remote) start(t *testing.T) *client.Client {
	conn := start(t, func(_ testing.TB, g *grpc.Server) {
		repb.RegisterCapabilitiesServer(g, r)
		bytestream.RegisterByteStreamServer(g, r)
	})
	return newClient(t, client.Options{Conn: conn, CompressFrom: 1000})
}

func TestClient_compresses_what_the_server_offers(t *testing.T) {
	zstd := []repb.Compressor_Value{repb.Compressor_BROTLI, repb.Compressor_ZSTD}
	for _, tc := range []struct {
		name  string
		r     *remote
		size  int
		want  repb.Compressor_Value
		asked int32 // by two blobs
	}{
		{name: "offered", r: &remote{compressors: zstd}, size: 1000, want: repb.Compressor_ZSTD, asked: 1},
		{name: "small", r: &remote{compressors: zstd}, size: 999, asked: 0},
		{name: "not offered", r: &remote{compressors: zstd[:1]}, size: 1000, asked: 1},
		{name: "no answer", r: &remote{capsErr: gstatus.Error(codes.Unavailable, "later")}, size: 1000, asked: 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.r.committed = func(n int64) int64 { return n }
			c := tc.r.start(t)
			for i := range 2 {
				data := bytes.Repeat([]byte{byte(i)}, tc.size)
				if err := blob.ReceiveBytes(t.Context(), c, digest.Of(digest.SHA256, data), data); err != nil {
					t.Fatal(err)
				}
				name, err := resource.ParseWrite(tc.r.name.Load().(string))
				if err != nil || name.Compressor != tc.want {
					t.Errorf("written as %v, %v, want %v", name, err, tc.want)
				}
			}
			if n := tc.r.asked.Load(); n != tc.asked {
				t.Errorf("the server was asked %d times, want %d", n, tc.asked)
			}
		})
	}
}

func TestClient_committed_sizes_of_compressed_blobs(t *testing.T) {
	data := blobtest.Random(1, 4<<20)
	d := digest.Of(digest.SHA256, data)
	for _, tc := range []struct {
		name      string
		committed func(int64) int64
		early     bool
		want      error
	}{
		{name: "what was sent", committed: func(n int64) int64 { return n }},
		{name: "there already", committed: func(int64) int64 { return -1 }, early: true},
		{name: "there already, told at the end", committed: func(int64) int64 { return -1 }},
		{name: "there already, told by its size", committed: func(int64) int64 { return d.Size() }, early: true},
		{name: "size of the blob", committed: func(int64) int64 { return d.Size() }},
		{name: "less than was sent", committed: func(n int64) int64 { return n - 1 }, want: blob.ErrUnavailable},
		{name: "a part", committed: func(n int64) int64 { return n }, early: true, want: blob.ErrUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &remote{compressors: []repb.Compressor_Value{repb.Compressor_ZSTD}, committed: tc.committed, early: tc.early}
			if err := blob.ReceiveBytes(t.Context(), r.start(t), d, data); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
}

func TestClient_reads_what_is_not_right(t *testing.T) {
	codec, err := compress.New()
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("words "), 50_000)
	d := digest.Of(digest.SHA256, data)
	z := codec.Append(nil, data)
	for _, tc := range []struct {
		name string
		sent []byte
		want error
	}{
		{name: "right", sent: z},
		{name: "too few", sent: codec.Append(nil, data[1:]), want: blob.ErrCorrupt},
		{name: "too many", sent: codec.Append(nil, append(bytes.Clone(data), 'x')), want: blob.ErrCorrupt},
		{name: "truncated", sent: z[:len(z)-1], want: blob.ErrCorrupt},
		{name: "not compressed", sent: data, want: blob.ErrCorrupt},
		{name: "nothing", want: blob.ErrCorrupt},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &remote{compressors: []repb.Compressor_Value{repb.Compressor_ZSTD}, data: tc.sent}
			rd, err := r.start(t).Open(t.Context(), d, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer rd.Close()
			got, err := io.ReadAll(rd)
			if !errors.Is(err, tc.want) || (tc.want == nil && !bytes.Equal(got, data)) {
				t.Errorf("%d bytes, error %v, want %v", len(got), err, tc.want)
			}
		})
	}
}

func BenchmarkClient(b *testing.B) {
	data := blobtest.Random(1, 64<<20)
	copy(data[32<<20:], bytes.Repeat([]byte("words that come again, "), 32<<20/23))
	d := digest.Of(digest.SHA256, data)
	for _, from := range []int64{0, 1} {
		c := newClient(b, client.Options{Conn: start(b, register), CompressFrom: from})
		b.Run(fmt.Sprintf("Create/%d", from), func(b *testing.B) {
			b.SetBytes(d.Size())
			for i := 0; b.Loop(); i++ {
				b.StopTimer()
				data[0], data[1] = byte(i), byte(i>>8)
				d = digest.Of(digest.SHA256, data)
				b.StartTimer()
				if err := blob.Receive(b.Context(), c, d, bytes.NewReader(data)); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("Open/%d", from), func(b *testing.B) {
			b.SetBytes(d.Size())
			for b.Loop() {
				r, err := c.Open(b.Context(), d, 0)
				if err != nil {
					b.Fatal(err)
				}
				if n, err := io.Copy(io.Discard, r); n != d.Size() || err != nil {
					b.Fatal(n, err)
				}
				_ = r.Close()
			}
		})
	}
}
