package conform

import (
	"context"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

const (
	independent = "The requests may succeed or fail independently."
	batchWrong  = "The [Digest][build.bazel.remote.execution.v2.Digest] does not match the provided data."
	batchStatus = "Every error on individual read will be returned in the corresponding digest status."
	overLimit   = "The client attempted to upload more than the server supported limit."
)

// batchPut stores blobs in one batch, and wants each to be stored.
func (t *T) batchPut(ctx context.Context, fn repb.DigestFunction_Value, blobs ...[]byte) []*repb.Digest {
	req := &repb.BatchUpdateBlobsRequest{InstanceName: t.o.Instance, DigestFunction: fn}
	var ds []*repb.Digest
	for _, b := range blobs {
		ds = append(ds, t.digest(b))
		req.Requests = append(req.Requests, &repb.BatchUpdateBlobsRequest_Request{Digest: ds[len(ds)-1], Data: b})
	}
	r, err := t.calls.cas.BatchUpdateBlobs(ctx, req)
	t.ok("BatchUpdateBlobs", err)
	if len(r.Responses) != len(blobs) {
		t.fatalf("BatchUpdateBlobs of %d blobs has %d responses", len(blobs), len(r.Responses))
	}
	for _, one := range r.Responses {
		if one.GetStatus().GetCode() != 0 {
			t.fatalf("BatchUpdateBlobs of %v: %v", one.GetDigest(), one.GetStatus())
		}
	}
	return ds
}

// batchRead reads blobs in one batch.
func (t *T) batchRead(ctx context.Context, accept []repb.Compressor_Value, ds ...*repb.Digest) []*repb.BatchReadBlobsResponse_Response {
	r, err := t.calls.cas.BatchReadBlobs(ctx, &repb.BatchReadBlobsRequest{
		InstanceName: t.o.Instance, Digests: ds, DigestFunction: t.function(), AcceptableCompressors: accept,
	})
	t.ok("BatchReadBlobs", err)
	if len(r.Responses) != len(ds) {
		t.fatalf("BatchReadBlobs of %d blobs has %d responses", len(ds), len(r.Responses))
	}
	return r.Responses
}

// responseFor is that of a digest.
func responseFor(rs []*repb.BatchReadBlobsResponse_Response, d *repb.Digest) *repb.BatchReadBlobsResponse_Response {
	for _, r := range rs {
		if proto.Equal(r.Digest, d) {
			return r
		}
	}
	return nil
}

func (t *T) compressed(data []byte) []byte {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.fatalf("zstd: %v", err)
	}
	defer enc.Close() //nolint:errcheck // it has written nothing
	return enc.EncodeAll(data, nil)
}

func (t *T) decompressed(data []byte) []byte {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		t.fatalf("zstd: %v", err)
	}
	defer dec.Close()
	out, err := dec.DecodeAll(data, nil)
	if err != nil {
		t.fatalf("what is said to be zstd is not: %v", err)
	}
	return out
}

func batchCases() []Case {
	return slices.Concat(batchUpdateCases(), batchReadCases(), batchZstdCases())
}

//nolint:revive // a table
func batchUpdateCases() []Case {
	cas := []need{needsCache}
	return []Case{
		{Name: "batch_update/several", Clause: "Upload many blobs at once.", Needs: cas, run: func(ctx context.Context, t *T) {
			ds := t.batchPut(ctx, t.function(), t.bytes(1), t.bytes(100), t.bytes(10_000))
			if m := t.missing(ctx, ds...); len(m) > 0 {
				t.errorf("%d of 3 are missing afterwards", len(m))
			}
		}},
		{Name: "batch_update/responses_name_digests", Clause: "The blob digest to which this response corresponds.", Needs: cas, run: func(ctx context.Context, t *T) {
			a, b := t.bytes(10), t.bytes(20)
			r, err := t.calls.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{InstanceName: t.o.Instance, DigestFunction: t.function(), Requests: []*repb.BatchUpdateBlobsRequest_Request{
				{Digest: t.digest(a), Data: a}, {Digest: t.digest(b), Data: b},
			}})
			t.ok("BatchUpdateBlobs", err)
			var got []*repb.Digest
			for _, one := range r.Responses {
				got = append(got, one.Digest)
			}
			if !has(got, t.digest(a)) || !has(got, t.digest(b)) {
				t.errorf("the responses are for %v", got)
			}
		}},
		{Name: "batch_update/wrong_content", Clause: batchWrong, Needs: cas, run: func(ctx context.Context, t *T) {
			good, d := t.bytes(50), t.fresh()
			r, err := t.calls.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{InstanceName: t.o.Instance, DigestFunction: t.function(), Requests: []*repb.BatchUpdateBlobsRequest_Request{
				{Digest: d, Data: t.bytes(int(d.SizeBytes))}, {Digest: t.digest(good), Data: good},
			}})
			t.ok("BatchUpdateBlobs, one of which is wrong", err)
			for _, one := range r.Responses {
				want := codes.OK
				if proto.Equal(one.Digest, d) {
					want = codes.InvalidArgument
				}
				if got := codes.Code(one.GetStatus().GetCode()); got != want { //nolint:gosec // a code
					t.errorf("%v has status %v, want %v", one.Digest, got, want)
				}
			}
			if !t.isMissing(ctx, d) {
				t.errorf("the digest of other bytes is there afterwards")
			}
			if t.isMissing(ctx, t.digest(good)) {
				t.errorf("the other blob of the batch is not there afterwards")
			}
		}},
		{Name: "batch_update/wrong_size", Clause: sizeClause, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(50)
			d := t.digest(data)
			d.SizeBytes = 51
			r, err := t.calls.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{InstanceName: t.o.Instance, DigestFunction: t.function(), Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: d, Data: data}}})
			if err == nil && len(r.Responses) == 1 {
				if c := codes.Code(r.Responses[0].GetStatus().GetCode()); c != codes.InvalidArgument { //nolint:gosec // a code
					t.errorf("50 bytes under a digest of 51 have status %v, want INVALID_ARGUMENT", c)
				}
				return
			}
			t.want("50 bytes under a digest of 51", err, codes.InvalidArgument)
		}},
		{Name: "batch_update/empty_blob", Clause: emptyClause, Needs: cas, run: func(ctx context.Context, t *T) {
			t.batchPut(ctx, t.function(), nil)
		}},
		{Name: "batch_update/again", Clause: "This request is equivalent to calling a Bytestream `Write` request on each individual blob, in parallel.", Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(70)
			t.batchPut(ctx, t.function(), data)
			t.batchPut(ctx, t.function(), data)
		}},
		{Name: "batch_update/same_blob_twice", Clause: independent, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(70)
			t.batchPut(ctx, t.function(), data, data)
		}},
		{Name: "batch_update/over_the_limit", Clause: overLimit, Needs: cas, run: func(ctx context.Context, t *T) {
			limit := t.caps.CacheCapabilities.MaxBatchTotalSizeBytes
			if limit == 0 || limit > 32<<20 {
				t.skipf("the server announces a limit of %d bytes", limit)
			}
			data := t.bytes(int(limit) + 1)
			_, err := t.calls.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{InstanceName: t.o.Instance, DigestFunction: t.function(), Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: t.digest(data), Data: data}}})
			t.want("a batch of a byte more than the limit", err, codes.InvalidArgument, codes.ResourceExhausted)
		}},
		{Name: "batch_update/up_to_the_limit", Clause: "Maximum total size of blobs to be uploaded/downloaded using batch methods.", Needs: cas, run: func(ctx context.Context, t *T) {
			limit := t.caps.CacheCapabilities.MaxBatchTotalSizeBytes
			if limit == 0 || limit > 32<<20 {
				t.skipf("the server announces a limit of %d bytes", limit)
			}
			half := t.bytes(int(limit / 2))
			t.batchPut(ctx, t.function(), half, t.bytes(int(limit)-len(half)))
		}},
		{Name: "batch_update/no_digest", Clause: "This MUST be the digest of `data`.", Needs: cas, run: func(ctx context.Context, t *T) {
			r, err := t.calls.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{InstanceName: t.o.Instance, DigestFunction: t.function(), Requests: []*repb.BatchUpdateBlobsRequest_Request{{Data: t.bytes(3)}}})
			if err == nil && len(r.Responses) == 1 && codes.Code(r.Responses[0].GetStatus().GetCode()) == codes.InvalidArgument { //nolint:gosec // a code
				return
			}
			t.want("a blob without a digest", err, codes.InvalidArgument)
		}},
		{Name: "batch_update/unknown_compressor", Clause: "Must be `IDENTITY`/unspecified, or one of the compressors advertised by the", Needs: cas, run: func(ctx context.Context, t *T) {
			if slices.Contains(t.caps.CacheCapabilities.SupportedBatchUpdateCompressors, repb.Compressor_BROTLI) {
				t.skipf("the server announces Brotli")
			}
			data := t.bytes(30)
			r, err := t.calls.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{InstanceName: t.o.Instance, DigestFunction: t.function(), Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: t.digest(data), Data: data, Compressor: repb.Compressor_BROTLI}}})
			if err == nil && len(r.Responses) == 1 && r.Responses[0].GetStatus().GetCode() == 0 {
				t.errorf("a blob that is said to be in Brotli, which is not announced, is taken")
			}
		}},
	}
}

func batchReadCases() []Case {
	cas := []need{needsCache}
	return []Case{
		{Name: "batch_read/several", Clause: "Download many blobs at once.", Needs: cas, run: func(ctx context.Context, t *T) {
			blobs := [][]byte{t.bytes(1), t.bytes(100), t.bytes(10_000)}
			ds := t.batchPut(ctx, t.function(), blobs...)
			rs := t.batchRead(ctx, nil, ds...)
			for i, d := range ds {
				r := responseFor(rs, d)
				if r == nil || r.GetStatus().GetCode() != 0 {
					t.errorf("%v: %v", d, r.GetStatus())
					continue
				}
				t.same("BatchReadBlobs", r.Data, blobs[i])
			}
		}},
		{Name: "batch_read/absent", Clause: batchStatus, Needs: cas, run: func(ctx context.Context, t *T) {
			there, absent := t.put(ctx, t.bytes(40)), t.fresh()
			rs := t.batchRead(ctx, nil, there, absent)
			if r := responseFor(rs, absent); codes.Code(r.GetStatus().GetCode()) != codes.NotFound { //nolint:gosec // a code
				t.errorf("a blob that is not there: %v, want NOT_FOUND", r.GetStatus())
			}
			if r := responseFor(rs, there); r == nil || r.GetStatus().GetCode() != 0 {
				t.errorf("the other blob of the batch: %v", r.GetStatus())
			}
		}},
		{Name: "batch_read/empty_blob", Clause: emptyClause, Needs: cas, run: func(ctx context.Context, t *T) {
			if r := t.batchRead(ctx, nil, t.digest(nil))[0]; r.GetStatus().GetCode() != 0 || len(r.Data) != 0 {
				t.errorf("the empty blob: %v with %d bytes", r.GetStatus(), len(r.Data))
			}
		}},
		{Name: "batch_read/another_size", Clause: sizeClause, Needs: cas, run: func(ctx context.Context, t *T) {
			d := t.put(ctx, t.bytes(40))
			d.SizeBytes = 39
			r, err := t.calls.cas.BatchReadBlobs(ctx, &repb.BatchReadBlobsRequest{InstanceName: t.o.Instance, Digests: []*repb.Digest{d}, DigestFunction: t.function()})
			if err == nil && len(r.Responses) == 1 && r.Responses[0].GetStatus().GetCode() == 0 {
				t.errorf("a blob of 40 bytes was read under a digest of 39: %d bytes", len(r.Responses[0].Data))
			}
		}},
		{Name: "batch_read/over_the_limit", Clause: "The client attempted to read more than the server supported limit.", Needs: cas, run: func(ctx context.Context, t *T) {
			limit := t.caps.CacheCapabilities.MaxBatchTotalSizeBytes
			if limit == 0 || limit > 32<<20 {
				t.skipf("the server announces a limit of %d bytes", limit)
			}
			d := t.put(ctx, t.bytes(int(limit)+1))
			r, err := t.calls.cas.BatchReadBlobs(ctx, &repb.BatchReadBlobsRequest{InstanceName: t.o.Instance, Digests: []*repb.Digest{d}, DigestFunction: t.function()})
			if err == nil && len(r.GetResponses()) == 1 && r.Responses[0].GetStatus().GetCode() != 0 {
				return
			}
			t.want("a batch of a byte more than the limit", err, codes.InvalidArgument, codes.ResourceExhausted)
		}},
		{Name: "batch_read/identity_by_default", Clause: "MUST be `IDENTITY`/unspecified, or one of the acceptable compressors specified in the `BatchReadBlobsRequest`.", Needs: cas, run: func(ctx context.Context, t *T) {
			data := make([]byte, 50_000) // zeros, which any server would like to compress
			copy(data, t.bytes(16))
			if r := t.batchRead(ctx, nil, t.put(ctx, data))[0]; r.Compressor != repb.Compressor_IDENTITY {
				t.errorf("the client accepts no compressor, and got %v", r.Compressor)
			}
		}},
		{Name: "batch_read/nothing", Clause: "The individual blob digests.", Needs: cas, run: func(ctx context.Context, t *T) {
			t.batchRead(ctx, nil)
		}},
	}
}

func batchZstdCases() []Case {
	return []Case{
		{Name: "batch_update/zstd", Clause: "Compressors supported for inlined data in", Needs: []need{needsBatchZstd}, run: func(ctx context.Context, t *T) {
			data := append(make([]byte, 3000), t.bytes(100)...)
			d := t.digest(data)
			r, err := t.calls.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{InstanceName: t.o.Instance, DigestFunction: t.function(), Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: d, Data: t.compressed(data), Compressor: repb.Compressor_ZSTD}}})
			t.ok("BatchUpdateBlobs", err)
			if s := r.Responses[0].GetStatus(); s.GetCode() != 0 {
				t.fatalf("a blob in zstd: %v", s)
			}
			got, err := t.read(ctx, t.readName(d), 0, 0)
			t.ok("Read", err)
			t.same("Read", got, data)
		}},
		{Name: "batch_update/zstd_garbage", Clause: batchWrong, Needs: []need{needsBatchZstd}, run: func(ctx context.Context, t *T) {
			data := t.bytes(300)
			r, err := t.calls.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{InstanceName: t.o.Instance, DigestFunction: t.function(), Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: t.digest(data), Data: data, Compressor: repb.Compressor_ZSTD}}})
			t.ok("BatchUpdateBlobs", err)
			if c := codes.Code(r.Responses[0].GetStatus().GetCode()); c != codes.InvalidArgument { //nolint:gosec // a code
				t.errorf("bytes that are no zstd have status %v, want INVALID_ARGUMENT", c)
			}
		}},
		{Name: "batch_read/zstd", Clause: "A list of acceptable encodings for the returned inlined data, in no particular order.", Needs: []need{needsZstd}, run: func(ctx context.Context, t *T) {
			data := append(make([]byte, 30_000), t.bytes(100)...)
			r := t.batchRead(ctx, []repb.Compressor_Value{repb.Compressor_ZSTD}, t.put(ctx, data))[0]
			got := r.Data
			switch r.Compressor {
			case repb.Compressor_IDENTITY:
			case repb.Compressor_ZSTD:
				got = t.decompressed(got)
			case repb.Compressor_DEFLATE, repb.Compressor_BROTLI:
				t.fatalf("the client accepts zstd and got %v", r.Compressor)
			}
			t.same("BatchReadBlobs", got, data)
		}},
	}
}
