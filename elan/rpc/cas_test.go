package rpc_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

func TestFindMissingBlobs(t *testing.T) {
	s := start(t, rpc.Options{})
	there := s.store.put([]byte("there"))
	gone := of([]byte("gone"))
	otherSize, err := digest.New(digest.SHA256, there.Hash(), 6)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: []*repb.Digest{
		gone.Proto(), there.Proto(), gone.Proto(), digest.Empty(digest.SHA256).Proto(), otherSize.Proto(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := &repb.FindMissingBlobsResponse{MissingBlobDigests: []*repb.Digest{gone.Proto(), otherSize.Proto()}}
	if diff := cmp.Diff(want, resp, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestFindMissingBlobs_asks_the_store_once(t *testing.T) {
	s := start(t, rpc.Options{})
	req := &repb.FindMissingBlobsRequest{}
	for i := range 20_000 {
		req.BlobDigests = append(req.BlobDigests, of(fmt.Append(nil, i)).Proto())
	}
	resp, err := s.cas.FindMissingBlobs(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.MissingBlobDigests) != 20_000 || s.store.finds != 1 {
		t.Errorf("%d are missing by %d calls, want 20000 by one", len(resp.MissingBlobDigests), s.store.finds)
	}
}

func TestFindMissingBlobs_digest_functions(t *testing.T) {
	s := start(t, rpc.Options{})
	for _, fn := range digest.Functions() {
		d := digest.Of(fn, []byte("x"))
		s.store.blobs[d] = []byte("x")
		resp, err := s.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: []*repb.Digest{d.Proto()}, DigestFunction: fn.Proto()})
		if err != nil || len(resp.MissingBlobDigests) != 0 {
			t.Errorf("%v: %v, %v", fn, resp, err)
		}
	}
	_, err := s.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{
		BlobDigests: []*repb.Digest{of([]byte("x")).Proto()}, DigestFunction: repb.DigestFunction_MD5,
	})
	wantCode(t, "FindMissingBlobs by MD5", err, codes.InvalidArgument)
}

func TestFindMissingBlobs_refusals(t *testing.T) {
	s := start(t, rpc.Options{})
	for _, d := range []*repb.Digest{nil, {}, {Hash: "abc", SizeBytes: 1}, {Hash: of(nil).Hash(), SizeBytes: -1}} {
		_, err := s.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: []*repb.Digest{d}})
		wantCode(t, fmt.Sprintf("FindMissingBlobs of %v", d), err, codes.InvalidArgument)
	}
	s.store.fail(blob.ErrUnavailable)
	_, err := s.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: []*repb.Digest{of([]byte("x")).Proto()}})
	wantCode(t, "FindMissingBlobs of a store that is away", err, codes.Unavailable)
}

func TestBatchUpdateBlobs_status_of_each(t *testing.T) {
	s := start(t, rpc.Options{MaxBlobBytes: 100})
	good, bad := of([]byte("good")), of([]byte("bad"))
	b3 := digest.Of(digest.BLAKE3, []byte("good"))
	large := pattern(101)
	reqs := []*repb.BatchUpdateBlobsRequest_Request{
		{Digest: bad.Proto(), Data: []byte("other")},
		{Digest: good.Proto(), Data: []byte("good")},
		{Digest: good.Proto(), Data: []byte("good")},
		{Digest: &repb.Digest{Hash: "xyz"}, Data: []byte("x")},
		{Data: []byte("x")},
		{Digest: bad.Proto(), Data: []byte("bad"), Compressor: repb.Compressor_DEFLATE},
		{Digest: of(large).Proto(), Data: large},
		{Digest: digest.Empty(digest.SHA256).Proto()},
		{Digest: b3.Proto(), Data: []byte("good")}, // BLAKE3 must be named
		{Digest: &repb.Digest{Hash: good.Hash(), SizeBytes: 1 << 60}, Data: []byte("good")},
	}
	want := []codes.Code{
		codes.InvalidArgument, codes.OK, codes.OK, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument,
		codes.InvalidArgument, codes.OK, codes.InvalidArgument, codes.InvalidArgument,
	}
	resp, err := s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: reqs})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Responses) != len(reqs) {
		t.Fatalf("%d responses, want %d", len(resp.Responses), len(reqs))
	}
	for i, r := range resp.Responses {
		if !proto.Equal(r.Digest, reqs[i].Digest) || codes.Code(r.GetStatus().GetCode()) != want[i] {
			t.Errorf("response %d: %v, want %v of %v", i, r, want[i], reqs[i].Digest)
		}
	}
	if len(s.store.blobs) != 2 || !bytes.Equal(s.store.blobs[good], []byte("good")) {
		t.Errorf("the store has %d blobs, want the good one and the empty one", len(s.store.blobs))
	}
}

func TestBatchUpdateBlobs_limit(t *testing.T) {
	s := start(t, rpc.Options{MaxBatchBytes: 1000})
	one := func(n int) *repb.BatchUpdateBlobsRequest_Request {
		return &repb.BatchUpdateBlobsRequest_Request{Digest: of(pattern(n)).Proto(), Data: pattern(n)}
	}
	_, err := s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: []*repb.BatchUpdateBlobsRequest_Request{one(600), one(400)}})
	wantCode(t, "a batch at the limit", err, codes.OK)
	_, err = s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: []*repb.BatchUpdateBlobsRequest_Request{one(600), one(401)}})
	wantCode(t, "a batch over the limit", err, codes.InvalidArgument)
}

func TestBatchUpdateBlobs_full_store(t *testing.T) {
	s := start(t, rpc.Options{})
	s.store.fail(blob.ErrFull)
	resp, err := s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{
		Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: of([]byte("x")).Proto(), Data: []byte("x")}},
	})
	if err != nil || codes.Code(resp.Responses[0].Status.Code) != codes.ResourceExhausted {
		t.Errorf("%v, %v, want RESOURCE_EXHAUSTED for the blob", resp, err)
	}
}

func TestBatchReadBlobs(t *testing.T) {
	s := start(t, rpc.Options{})
	a, b := s.store.put([]byte("a")), s.store.put([]byte("bb"))
	gone := of([]byte("gone"))
	short := of([]byte("short of bytes"))
	s.store.blobs[short] = []byte("short")
	ds := []*repb.Digest{b.Proto(), gone.Proto(), a.Proto(), b.Proto(), digest.Empty(digest.SHA256).Proto(), {Hash: "x"}, short.Proto(), {Hash: a.Hash(), SizeBytes: -4}}
	resp, err := s.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: ds, AcceptableCompressors: []repb.Compressor_Value{repb.Compressor_ZSTD}})
	if err != nil {
		t.Fatal(err)
	}
	want := []struct {
		data string
		code codes.Code
	}{
		{data: "bb"},
		{code: codes.NotFound},
		{data: "a"},
		{data: "bb"},
		{},
		{code: codes.InvalidArgument},
		{code: codes.Internal},
		{code: codes.InvalidArgument},
	}
	if len(resp.Responses) != len(want) {
		t.Fatalf("%d responses, want %d", len(resp.Responses), len(want))
	}
	for i, r := range resp.Responses {
		if !proto.Equal(r.Digest, ds[i]) || string(r.Data) != want[i].data || codes.Code(r.GetStatus().GetCode()) != want[i].code || r.Compressor != repb.Compressor_IDENTITY {
			t.Errorf("response %d: %v, want %+v of %v", i, r, want[i], ds[i])
		}
	}
}

func TestBatchReadBlobs_limits(t *testing.T) {
	s := start(t, rpc.Options{})
	for _, tc := range []struct {
		name string
		ds   []*repb.Digest
	}{
		{name: "one too large", ds: []*repb.Digest{{Hash: of([]byte("x")).Hash(), SizeBytes: 4 << 20}}},
		{name: "a sum that overflows", ds: []*repb.Digest{{Hash: of([]byte("x")).Hash(), SizeBytes: 1<<63 - 1}, {Hash: of([]byte("x")).Hash(), SizeBytes: 1<<63 - 1}}},
		{name: "too many for a message", ds: func() (ds []*repb.Digest) {
			for range 30_000 {
				ds = append(ds, of([]byte("x")).Proto())
			}
			return ds
		}()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := s.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: tc.ds})
			wantCode(t, "BatchReadBlobs", err, codes.InvalidArgument)
		})
	}
}

// A reply of failures alone must fit into a message too.
func TestBatches_of_failures_fit_into_a_message(t *testing.T) {
	s := start(t, rpc.Options{})
	read, update := &repb.BatchReadBlobsRequest{}, &repb.BatchUpdateBlobsRequest{}
	for i := range 20_000 {
		d := of(fmt.Append(nil, i)).Proto()
		read.Digests = append(read.Digests, d)
		update.Requests = append(update.Requests, &repb.BatchUpdateBlobsRequest_Request{Digest: d, Data: []byte("x")})
	}
	got, err := s.cas.BatchReadBlobs(t.Context(), read)
	if err != nil || len(got.Responses) != 20_000 || got.Responses[19_999].Status.Code != int32(codes.NotFound) {
		t.Errorf("BatchReadBlobs: %d responses, %v, want 20000 that say NOT_FOUND", len(got.GetResponses()), err)
	}
	put, err := s.cas.BatchUpdateBlobs(t.Context(), update)
	if err != nil || len(put.Responses) != 20_000 || put.Responses[19_999].Status.Code != int32(codes.InvalidArgument) {
		t.Errorf("BatchUpdateBlobs: %d responses, %v, want 20000 that say INVALID_ARGUMENT", len(put.GetResponses()), err)
	}
}

func TestSplitting_is_not_served(t *testing.T) {
	s := start(t, rpc.Options{})
	_, err := s.cas.SplitBlob(t.Context(), &repb.SplitBlobRequest{})
	wantCode(t, "SplitBlob", err, codes.Unimplemented)
	_, err = s.cas.SpliceBlob(t.Context(), &repb.SpliceBlobRequest{})
	wantCode(t, "SpliceBlob", err, codes.Unimplemented)
}

func TestGetCapabilities(t *testing.T) {
	exec := &repb.ExecutionCapabilities{DigestFunction: repb.DigestFunction_SHA256, ExecEnabled: true}
	s := start(t, rpc.Options{Execution: exec, MaxBatchBytes: 12345, MaxBlobBytes: 1 << 40})
	got, err := s.capabilities.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{InstanceName: "any/at all"})
	if err != nil {
		t.Fatal(err)
	}
	if v := got.LowApiVersion; v.Major != 2 || v.Minor != 0 {
		t.Errorf("low_api_version %v, want 2.0, for Please and Bazel before 7", v)
	}
	if v := got.HighApiVersion; v.Major != 2 || v.Minor != 13 {
		t.Errorf("high_api_version %v, want 2.13", v)
	}
	if diff := cmp.Diff(exec, got.ExecutionCapabilities, protocmp.Transform()); diff != "" {
		t.Errorf("execution_capabilities (-want +got)\n%s", diff)
	}
	c := got.CacheCapabilities
	if c.MaxBatchTotalSizeBytes != 12345 || c.MaxCasBlobSizeBytes != 1<<40 || !c.ActionCacheUpdateCapabilities.GetUpdateEnabled() ||
		c.SymlinkAbsolutePathStrategy != repb.SymlinkAbsolutePathStrategy_ALLOWED ||
		c.SplitBlobSupport || c.SpliceBlobSupport || c.FastCdc_2020Params != nil || c.RepMaxCdcParams != nil {
		t.Errorf("cache_capabilities: %v", c)
	}
	zstd := []repb.Compressor_Value{repb.Compressor_ZSTD}
	if !slices.Equal(c.SupportedCompressors, zstd) || !slices.Equal(c.SupportedBatchUpdateCompressors, zstd) {
		t.Errorf("compressors: %v, in batches %v, want zstd", c.SupportedCompressors, c.SupportedBatchUpdateCompressors)
	}
	if c.DigestFunctions[0] != repb.DigestFunction_SHA256 || len(c.DigestFunctions) != len(digest.Functions()) {
		t.Errorf("digest_functions: %v, want all, SHA256 first", c.DigestFunctions)
	}
	if n := start(t, rpc.Options{}); n != nil {
		got, err := n.capabilities.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{})
		if err != nil || got.ExecutionCapabilities != nil || got.CacheCapabilities.MaxBatchTotalSizeBytes <= 0 || got.CacheCapabilities.MaxBatchTotalSizeBytes >= 4<<20 {
			t.Errorf("without execution: %v, %v", got, err)
		}
	}
}

// TestBatchUpdateBlobs_many: blobs of no bytes count too, or a message of some
// megabytes would make for gigabytes of statuses.
func TestBatchUpdateBlobs_many(t *testing.T) {
	s := start(t, rpc.Options{})
	one := &repb.BatchUpdateBlobsRequest_Request{Digest: of(nil).Proto()}
	for n, want := range map[int]codes.Code{10_000: codes.OK, 87_000: codes.OK, 88_000: codes.InvalidArgument} {
		req := &repb.BatchUpdateBlobsRequest{Requests: slices.Repeat([]*repb.BatchUpdateBlobsRequest_Request{one}, n)}
		if n > 10_000 {
			req.Requests = slices.Repeat([]*repb.BatchUpdateBlobsRequest_Request{{}}, n)
		}
		resp, err := s.cas.BatchUpdateBlobs(t.Context(), req)
		wantCode(t, fmt.Sprint(n, " blobs"), err, want)
		if err == nil && len(resp.Responses) != n {
			t.Errorf("%d responses, want %d", len(resp.Responses), n)
		}
	}
}
