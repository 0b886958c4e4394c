package rpc_test

import (
	"bytes"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

// pack compresses data as a client does that knows nothing of the server: in
// one stream, with a checksum.
func pack(tb testing.TB, data []byte, opts ...zstd.EOption) []byte {
	tb.Helper()
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, append([]zstd.EOption{zstd.WithEncoderConcurrency(1), zstd.WithZeroFrames(true)}, opts...)...)
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		tb.Fatal(err)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

func unpack(tb testing.TB, z []byte) []byte {
	tb.Helper()
	r, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		tb.Fatal(err)
	}
	data, err := r.DecodeAll(z, nil)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

// mixed is n bytes of which half compress well.
func mixed(n int) []byte {
	data := bytes.Repeat([]byte("words that come again, "), n/23+1)[:n]
	copy(data[n/2:], pattern(n-n/2))
	return data
}

func TestReadCompressed(t *testing.T) {
	s := start(t, rpc.Options{})
	for _, size := range []int{1, 1000, 1 << 20, 1<<20 + 1, 3<<20 + 17} {
		data := mixed(size)
		d := s.store.put(data)
		for _, offset := range []int{0, 1, size / 2, size - 1, size} {
			z, err := s.read(t, &bytestream.ReadRequest{ResourceName: "a/b/compressed-blobs/zstd/" + d.String(), ReadOffset: int64(offset)})
			if err != nil {
				t.Fatal(err)
			}
			if got := unpack(t, z); len(z) == 0 || !bytes.Equal(got, data[offset:]) {
				t.Errorf("%d bytes from %d: %d bytes make %d", size, offset, len(z), len(got))
			}
			if offset == 0 && size >= 1000 && len(z) > size*6/10 {
				t.Errorf("%d bytes are %d when compressed", size, len(z))
			}
		}
	}
	for _, fn := range digest.Functions() {
		z, err := s.read(t, &bytestream.ReadRequest{ResourceName: "compressed-blobs/zstd/" + digest.Empty(fn).String()})
		if err != nil || len(z) == 0 || len(unpack(t, z)) != 0 {
			t.Errorf("the empty %v blob: %q, %v, want an empty frame", fn, z, err)
		}
	}
}

func TestReadCompressed_refusals(t *testing.T) {
	s := start(t, rpc.Options{})
	d := s.store.put([]byte("hello"))
	absent := of([]byte("absent"))
	short := of([]byte("short of bytes"))
	s.store.blobs[short] = []byte("short of")
	name := "compressed-blobs/zstd/" + d.String()
	for _, tc := range []struct {
		name string
		req  *bytestream.ReadRequest
		want codes.Code
	}{
		{"limit", &bytestream.ReadRequest{ResourceName: name, ReadLimit: 5}, codes.InvalidArgument},
		{"negative limit", &bytestream.ReadRequest{ResourceName: name, ReadLimit: -1}, codes.InvalidArgument},
		{"negative offset", &bytestream.ReadRequest{ResourceName: name, ReadOffset: -1}, codes.OutOfRange},
		{"offset past the end", &bytestream.ReadRequest{ResourceName: name, ReadOffset: 6}, codes.OutOfRange},
		{"absent", &bytestream.ReadRequest{ResourceName: "compressed-blobs/zstd/" + absent.String()}, codes.NotFound},
		{"absent at its end", &bytestream.ReadRequest{ResourceName: "compressed-blobs/zstd/" + absent.String(), ReadOffset: absent.Size()}, codes.NotFound},
		{"short in the store", &bytestream.ReadRequest{ResourceName: "compressed-blobs/zstd/" + short.String()}, codes.Internal},
		{"deflate", &bytestream.ReadRequest{ResourceName: "compressed-blobs/deflate/" + d.String()}, codes.InvalidArgument},
		{"brotli", &bytestream.ReadRequest{ResourceName: "compressed-blobs/brotli/" + d.String()}, codes.InvalidArgument},
		{"unknown", &bytestream.ReadRequest{ResourceName: "compressed-blobs/lz4/" + d.String()}, codes.InvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := s.read(t, tc.req)
			wantCode(t, "Read", err, tc.want)
		})
	}
}

func TestBatchUpdateBlobs_compressed(t *testing.T) {
	s := start(t, rpc.Options{MaxBatchBytes: 100_000})
	data := mixed(10_000)
	d := of(data)
	z := pack(t, data)
	request := func(d digest.Digest, z []byte) *repb.BatchUpdateBlobsRequest_Request {
		return &repb.BatchUpdateBlobsRequest_Request{Digest: d.Proto(), Data: z, Compressor: repb.Compressor_ZSTD}
	}
	reqs := []*repb.BatchUpdateBlobsRequest_Request{
		request(d, z),
		request(of([]byte("plain")), []byte("plain")),
		{Digest: of([]byte("plain")).Proto(), Data: []byte("plain")},
		request(of(data[1:]), z),
		request(of([]byte("cut")), pack(t, []byte("cut"))[:8]),
		request(of([]byte("bomb")), pack(t, make([]byte, 10<<20))),
		request(of([]byte("tail")), append(pack(t, []byte("tail")), 'x')),
		{Digest: d.Proto(), Data: z, Compressor: repb.Compressor_BROTLI},
		{Digest: &repb.Digest{Hash: d.Hash(), SizeBytes: -1}, Data: z, Compressor: repb.Compressor_ZSTD},
		request(of(nil), pack(t, nil)),
	}
	want := []codes.Code{
		codes.OK, codes.InvalidArgument, codes.OK, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument,
		codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.OK,
	}
	resp, err := s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: reqs})
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range resp.Responses {
		if codes.Code(r.GetStatus().GetCode()) != want[i] {
			t.Errorf("response %d: %v, want %v", i, r, want[i])
		}
	}
	if len(s.store.blobs) != 3 || !bytes.Equal(s.store.blobs[d], data) {
		t.Errorf("the store has %d blobs, want the two good ones and the empty one", len(s.store.blobs))
	}
}

// The limit is on the blobs as they are, however few bytes they come in.
func TestBatchUpdateBlobs_limit_of_compressed_blobs(t *testing.T) {
	s := start(t, rpc.Options{MaxBatchBytes: 1000})
	one := func(n int) *repb.BatchUpdateBlobsRequest_Request {
		data := make([]byte, n)
		return &repb.BatchUpdateBlobsRequest_Request{Digest: of(data).Proto(), Data: pack(t, data), Compressor: repb.Compressor_ZSTD}
	}
	_, err := s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: []*repb.BatchUpdateBlobsRequest_Request{one(600), one(400)}})
	wantCode(t, "a batch at the limit", err, codes.OK)
	_, err = s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: []*repb.BatchUpdateBlobsRequest_Request{one(600), one(401)}})
	wantCode(t, "a batch over the limit", err, codes.InvalidArgument)
	huge := one(1)
	huge.Digest.SizeBytes = 1<<63 - 1
	_, err = s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: []*repb.BatchUpdateBlobsRequest_Request{huge, huge}})
	wantCode(t, "a batch of a sum that overflows", err, codes.InvalidArgument)
}

func TestBatchReadBlobs_compressed(t *testing.T) {
	s := start(t, rpc.Options{})
	words := bytes.Repeat([]byte("words "), 1000)
	for _, tc := range []struct {
		name   string
		data   []byte
		accept []repb.Compressor_Value
		want   repb.Compressor_Value
	}{
		{name: "compressible", data: words, accept: []repb.Compressor_Value{repb.Compressor_BROTLI, repb.Compressor_ZSTD}, want: repb.Compressor_ZSTD},
		{name: "not asked for", data: words},
		{name: "only others asked for", data: words, accept: []repb.Compressor_Value{repb.Compressor_IDENTITY, repb.Compressor_DEFLATE}},
		{name: "random", data: blobtest.Random(1, 10_000), accept: []repb.Compressor_Value{repb.Compressor_ZSTD}},
		{name: "small", data: words[:100], accept: []repb.Compressor_Value{repb.Compressor_ZSTD}},
		{name: "empty", accept: []repb.Compressor_Value{repb.Compressor_ZSTD}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := s.store.put(tc.data)
			resp, err := s.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: []*repb.Digest{d.Proto()}, AcceptableCompressors: tc.accept})
			if err != nil {
				t.Fatal(err)
			}
			r := resp.Responses[0]
			got := r.Data
			if r.Compressor == repb.Compressor_ZSTD {
				got = unpack(t, r.Data)
			}
			if r.Compressor != tc.want || !bytes.Equal(got, tc.data) {
				t.Errorf("%d bytes by %v make %d, want %d by %v", len(r.Data), r.Compressor, len(got), len(tc.data), tc.want)
			}
		})
	}
}
