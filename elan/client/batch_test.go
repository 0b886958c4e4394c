package client_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	spb "google.golang.org/genproto/googleapis/rpc/status"
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

// batcher is a server with batches, that counts what it is asked.
type batcher struct {
	repb.UnimplementedCapabilitiesServer
	repb.UnimplementedContentAddressableStorageServer
	bytestream.UnimplementedByteStreamServer

	limit  int64
	zstd   bool
	fail   error                                                      // of batches
	answer func(d *repb.Digest) *repb.BatchReadBlobsResponse_Response // nil: the blob
	refuse *spb.Status                                                // of each blob written

	mu             sync.Mutex // guards the rest
	blobs          map[string][]byte
	reads, updates []int // blobs of each call
	streams        int
	compressed     int // blobs that came as zstd
}

func (b *batcher) GetCapabilities(context.Context, *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
	c := &repb.CacheCapabilities{MaxBatchTotalSizeBytes: b.limit}
	if b.zstd {
		c.SupportedCompressors = []repb.Compressor_Value{repb.Compressor_ZSTD}
		c.SupportedBatchUpdateCompressors = c.SupportedCompressors
	}
	return &repb.ServerCapabilities{CacheCapabilities: c}, nil
}

func (b *batcher) BatchReadBlobs(_ context.Context, req *repb.BatchReadBlobsRequest) (*repb.BatchReadBlobsResponse, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reads = append(b.reads, len(req.Digests))
	if b.fail != nil {
		return nil, b.fail
	}
	resp := &repb.BatchReadBlobsResponse{}
	for i := range req.Digests { // in another order, as the API allows
		d := req.Digests[len(req.Digests)-1-i]
		r := &repb.BatchReadBlobsResponse_Response{Digest: d, Data: b.blobs[d.Hash]}
		switch {
		case b.answer != nil:
			r = b.answer(d)
		case len(req.AcceptableCompressors) > 0:
			codec, err := compress.New()
			if err != nil {
				return nil, err
			}
			r.Data, r.Compressor = codec.Append(nil, r.Data), repb.Compressor_ZSTD
		}
		if r != nil {
			resp.Responses = append(resp.Responses, r)
		}
	}
	return resp, nil
}

func (b *batcher) BatchUpdateBlobs(_ context.Context, req *repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.updates = append(b.updates, len(req.Requests))
	if b.fail != nil {
		return nil, b.fail
	}
	resp := &repb.BatchUpdateBlobsResponse{}
	for _, r := range req.Requests {
		if r.Compressor == repb.Compressor_ZSTD {
			b.compressed++
		}
		b.blobs[r.Digest.Hash] = r.Data
		resp.Responses = append(resp.Responses, &repb.BatchUpdateBlobsResponse_Response{Digest: r.Digest, Status: b.refuse})
	}
	return resp, nil
}

func (b *batcher) Read(req *bytestream.ReadRequest, stream bytestream.ByteStream_ReadServer) error {
	name, err := resource.ParseRead(req.ResourceName)
	if err != nil {
		return err
	}
	b.mu.Lock()
	b.streams++
	data := b.blobs[name.Digest.Hash()]
	b.mu.Unlock()
	return stream.Send(&bytestream.ReadResponse{Data: data})
}

func (b *batcher) Write(stream bytestream.ByteStream_WriteServer) error {
	b.mu.Lock()
	b.streams++
	b.mu.Unlock()
	n := int64(0)
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		if n += int64(len(req.Data)); req.FinishWrite {
			return stream.SendAndClose(&bytestream.WriteResponse{CommittedSize: n})
		}
	}
}

func (b *batcher) start(t *testing.T, o client.Options) *client.Client {
	o.Conn = start(t, func(_ testing.TB, g *grpc.Server) {
		repb.RegisterCapabilitiesServer(g, b)
		repb.RegisterContentAddressableStorageServer(g, b)
		bytestream.RegisterByteStreamServer(g, b)
	})
	return newClient(t, o)
}

// some are blobs of these sizes, which the server has.
func (b *batcher) some(sizes ...int) (bs []blob.Bytes, ds []digest.Digest) {
	b.blobs = map[string][]byte{}
	for i, size := range sizes {
		data := bytes.Repeat(fmt.Appendf(nil, "%07d ", i), size/8+1)[:size]
		d := digest.Of(digest.SHA256, data)
		b.blobs[d.Hash()] = data
		bs, ds = append(bs, blob.Bytes{Digest: d, Data: data}), append(ds, d)
	}
	return bs, ds
}

// readAll reads a batch, and fails where a blob is told of twice.
func readAll(t *testing.T, c *client.Client, ds []digest.Digest) (got [][]byte, errs []error, err error) {
	t.Helper()
	var mu sync.Mutex
	told := make([]bool, len(ds))
	got, errs = make([][]byte, len(ds)), make([]error, len(ds))
	err = c.ReadBatch(t.Context(), ds, func(i int, data []byte, err error) {
		mu.Lock()
		defer mu.Unlock()
		if told[i] {
			t.Errorf("blob %d was told of twice", i)
		}
		told[i], got[i], errs[i] = true, data, err
	})
	for i, ok := range told {
		if !ok {
			errs[i] = err
		}
	}
	return got, errs, err
}

func TestClient_batches(t *testing.T) {
	unimplemented := gstatus.Error(codes.Unimplemented, "no batches")
	for _, tc := range []struct {
		name           string
		b              *batcher // nil: the zero one
		o              client.Options
		sizes          []int
		calls, streams int
		compressed     int
	}{
		{name: "one call", sizes: []int{0, 1, 100, 1000, 10_000}, calls: 1},
		{name: "message limit", sizes: []int{3 << 20, 1 << 20, 1 << 20}, calls: 2},
		{name: "server limit", b: &batcher{limit: 1000}, sizes: []int{500, 500, 1, 999, 1000}, calls: 3},
		{name: "too large", b: &batcher{limit: 1000}, sizes: []int{1, 1001, 3 << 20}, calls: 1, streams: 2},
		{name: "no batches", b: &batcher{fail: unimplemented}, sizes: []int{1, 2, 3}, calls: 1, streams: 3},
		{name: "zstd", b: &batcher{zstd: true}, o: client.Options{CompressFrom: 1000}, sizes: []int{999, 1000, 10_000}, calls: 1, compressed: 2},
		{name: "zstd is not offered", o: client.Options{CompressFrom: 1000}, sizes: []int{10_000}, calls: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := cmp.Or(tc.b, &batcher{})
			bs, ds := b.some(tc.sizes...)
			c := b.start(t, tc.o)
			got, errs, err := readAll(t, c, ds)
			if err != nil {
				t.Fatal(err)
			}
			for i := range got {
				if errs[i] != nil || !bytes.Equal(got[i], bs[i].Data) {
					t.Errorf("blob %d of %d bytes: %d bytes, %v", i, len(bs[i].Data), len(got[i]), errs[i])
				}
			}
			if len(b.reads) != tc.calls || b.streams != tc.streams {
				t.Errorf("%d calls and %d streams to read, want %d and %d", len(b.reads), b.streams, tc.calls, tc.streams)
			}
			b.streams = 0
			if err := c.WriteBatch(t.Context(), bs); err != nil {
				t.Fatal(err)
			}
			if len(b.updates) != tc.calls || b.streams != tc.streams || b.compressed != tc.compressed {
				t.Errorf("%d calls and %d streams to write, %d blobs as zstd, want %d, %d and %d", len(b.updates), b.streams, b.compressed, tc.calls, tc.streams, tc.compressed)
			}
		})
	}
}

func TestClient_batch_answers(t *testing.T) {
	type response = repb.BatchReadBlobsResponse_Response
	b := &batcher{}
	bs, ds := b.some(100, 200)
	for _, tc := range []struct {
		name   string
		answer func(d *repb.Digest) *response // about the second
		want   error                          // of the second; nil: any
	}{
		{name: "missing", want: blob.ErrNotFound, answer: func(d *repb.Digest) *response {
			return &response{Digest: d, Status: &spb.Status{Code: int32(codes.NotFound)}}
		}},
		{name: "away", want: blob.ErrUnavailable, answer: func(d *repb.Digest) *response {
			return &response{Digest: d, Status: &spb.Status{Code: int32(codes.Unavailable)}}
		}},
		{name: "short", want: blob.ErrCorrupt, answer: func(d *repb.Digest) *response { return &response{Digest: d, Data: bs[1].Data[1:]} }},
		{name: "unasked zstd", want: blob.ErrCorrupt, answer: func(d *repb.Digest) *response {
			return &response{Digest: d, Data: bs[1].Data, Compressor: repb.Compressor_ZSTD}
		}},
		{name: "nothing", answer: func(*repb.Digest) *response { return nil }},
		{name: "another", answer: func(*repb.Digest) *response {
			return &response{Digest: digest.Of(digest.SHA256, []byte("x")).Proto(), Data: []byte("x")}
		}},
		{name: "no digest", answer: func(*repb.Digest) *response { return &response{Data: bs[1].Data} }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := &batcher{blobs: b.blobs}
			b.answer = func(d *repb.Digest) *response {
				if d.Hash == ds[1].Hash() {
					return tc.answer(d)
				}
				return &response{Digest: d, Data: b.blobs[d.Hash]}
			}
			_, errs, _ := readAll(t, b.start(t, client.Options{}), ds)
			if errs[1] == nil || tc.want != nil && !errors.Is(errs[1], tc.want) {
				t.Errorf("error %v, want %v", errs[1], tc.want)
			}
			if tc.want == nil && errors.Is(errs[1], blob.ErrNotFound) {
				t.Errorf("error %v: that it is missing was not said", errs[1])
			}
			if tc.want != nil && errs[0] != nil {
				t.Errorf("the other blob: %v", errs[0])
			}
		})
	}
}

func TestClient_batch_writes_refused(t *testing.T) {
	b := &batcher{refuse: &spb.Status{Code: int32(codes.ResourceExhausted)}}
	bs, _ := b.some(10, 20)
	if err := b.start(t, client.Options{}).WriteBatch(t.Context(), bs); !errors.Is(err, blob.ErrFull) {
		t.Errorf("error %v, want ErrFull", err)
	}
	bs[0].Data = bs[0].Data[1:]
	if err := b.start(t, client.Options{}).WriteBatch(t.Context(), bs); err == nil || errors.Is(err, blob.ErrFull) {
		t.Errorf("error %v for fewer bytes than the digest says", err)
	}
}

// A server that refuses a batch, or a blob of it, for now, is not asked for the blobs
// one by one.
func TestClient_batches_told_to_wait(t *testing.T) {
	b := &batcher{fail: later(t, codes.ResourceExhausted).Err()}
	bs, ds := b.some(10, 20)
	c := b.start(t, client.Options{})
	_, _, err := readAll(t, c, ds)
	wantLater(t, "ReadBatch", err)
	wantLater(t, "WriteBatch", c.WriteBatch(t.Context(), bs))
	if len(b.reads) != 1 || len(b.updates) != 1 || b.streams != 0 {
		t.Errorf("%d and %d batches, %d streams, want 1, 1, 0", len(b.reads), len(b.updates), b.streams)
	}
	b = &batcher{refuse: later(t, codes.ResourceExhausted).Proto()}
	bs, _ = b.some(10, 20)
	wantLater(t, "a blob of a batch", b.start(t, client.Options{}).WriteBatch(t.Context(), bs))
}

// What elan's own server says and takes.
func TestClient_batches_with_elan(t *testing.T) {
	for _, from := range []int64{0, 1000} {
		c := newClient(t, client.Options{Conn: start(t, register), CompressFrom: from})
		var bs []blob.Bytes
		var ds []digest.Digest
		for i, size := range []int{1, 1000, 50_000, 3 << 20, 5 << 20} {
			data := blobtest.Random(uint64(i), size)
			copy(data[size/2:], make([]byte, size/2))
			for _, fn := range []digest.Function{digest.SHA256, digest.BLAKE3} {
				d := digest.Of(fn, data)
				bs, ds = append(bs, blob.Bytes{Digest: d, Data: data}), append(ds, d)
			}
		}
		if err := c.WriteBatch(t.Context(), bs); err != nil {
			t.Fatal(err)
		}
		got, errs, err := readAll(t, c, ds)
		if err != nil {
			t.Fatal(err)
		}
		for i := range got {
			if errs[i] != nil || !bytes.Equal(got[i], bs[i].Data) {
				t.Errorf("blob %s: %d bytes, %v", ds[i], len(got[i]), errs[i])
			}
		}
	}
}
