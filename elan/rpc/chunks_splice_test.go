package rpc_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

// TestSplice_codes has a row for each clause of the specification.
func TestSplice_codes(t *testing.T) {
	f := newFakeChunker()
	f.params.MaxChunks = 100
	s := startOver(t, f, rpc.Options{MaxBlobBytes: 1 << 40})
	d, ds := manyChunks(3, digest.SHA256)
	chunks := protosOf(ds)
	size := func(n int64) *repb.Digest { return &repb.Digest{Hash: d.Hash(), SizeBytes: n} }
	for _, c := range []struct {
		name   string
		d      *repb.Digest
		chunks []*repb.Digest
		err    error
		want   codes.Code
	}{
		{"good", d.Proto(), chunks, nil, codes.OK},
		{"chunk_absent", d.Proto(), chunks, fmt.Errorf("x: %w", blob.ErrNotFound), codes.NotFound},
		{"no_room", d.Proto(), chunks, blob.ErrFull, codes.ResourceExhausted},
		{"other_bytes", d.Proto(), chunks, blob.ErrCorrupt, codes.InvalidArgument},
		{"store_away", d.Proto(), chunks, blob.ErrUnavailable, codes.Unavailable},
		{"no_digest", nil, chunks, nil, codes.InvalidArgument},
		{"too_few_bytes", d.Proto(), chunks[1:], nil, codes.InvalidArgument},
		{"too_many_bytes", d.Proto(), append(chunks[:3:3], chunks[0]), nil, codes.InvalidArgument},
		{"no_chunks", d.Proto(), nil, nil, codes.InvalidArgument},
		{"petabytes", size(1 << 60), []*repb.Digest{size(1 << 60)}, nil, codes.InvalidArgument},
		{"overflow", d.Proto(), []*repb.Digest{size(1 << 62), size(1 << 62), size(1 << 62), size(1 << 62)}, nil, codes.InvalidArgument},
		{"nil_chunk", d.Proto(), append(chunks[:3:3], nil), nil, codes.InvalidArgument},
		{"other_function", d.Proto(), []*repb.Digest{{Hash: d.Hash()[:40], SizeBytes: 1}}, nil, codes.InvalidArgument},
		{"negative_chunk", d.Proto(), []*repb.Digest{size(-1)}, nil, codes.InvalidArgument},
		{"too_many_chunks", d.Proto(), slices.Repeat([]*repb.Digest{digest.Empty(digest.SHA256).Proto()}, 101), nil, codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.say(blob.ChunkList{}, c.err)
			before := f.splices
			resp, err := s.cas.SpliceBlob(t.Context(), &repb.SpliceBlobRequest{BlobDigest: c.d, ChunkDigests: c.chunks})
			wantCode(t, "SpliceBlob", err, c.want)
			if err == nil && resp.BlobDigest.GetHash() != d.Hash() {
				t.Errorf("SpliceBlob: %v", resp)
			}
			_, err = register(t, s, &repb.RegisterChunkMappingRequest{BlobDigest: c.d, DigestFunction: repb.DigestFunction_SHA256, ChunkDigests: c.chunks})
			wantCode(t, "RegisterChunkMapping", err, c.want)
			if asked := f.splices > before; asked != (c.want == codes.OK || c.err != nil) {
				t.Errorf("the store was asked: %v", asked)
			}
		})
	}
}

// TestRegister_stream: the first request says what the blob is, and the others
// bring chunks.
func TestRegister_stream(t *testing.T) {
	f := newFakeChunker()
	s := startOver(t, f, rpc.Options{})
	d, ds := manyChunks(3, digest.SHA256)
	other, _ := manyChunks(5, digest.SHA512)
	chunks := protosOf(ds)
	first := &repb.RegisterChunkMappingRequest{BlobDigest: d.Proto(), DigestFunction: repb.DigestFunction_SHA256, ChunkingFunction: repb.ChunkingFunction_REP_MAX_CDC}
	for _, c := range []struct {
		name string
		reqs []*repb.RegisterChunkMappingRequest
		want codes.Code
	}{
		{"empty_ones_between", []*repb.RegisterChunkMappingRequest{first, {}, {ChunkDigests: chunks[:2]}, {}, {ChunkDigests: chunks[2:]}, {}}, codes.OK},
		{"other_fields_later", []*repb.RegisterChunkMappingRequest{first, {
			InstanceName: "other", BlobDigest: other.Proto(), DigestFunction: repb.DigestFunction_SHA512, ChunkingFunction: repb.ChunkingFunction_FAST_CDC_2020, ChunkDigests: chunks,
		}}, codes.OK},
		{"nothing", nil, codes.InvalidArgument},
		{"digest_later", []*repb.RegisterChunkMappingRequest{{DigestFunction: repb.DigestFunction_SHA256}, first, {ChunkDigests: chunks}}, codes.InvalidArgument},
		{"no_function", []*repb.RegisterChunkMappingRequest{{BlobDigest: d.Proto(), ChunkDigests: chunks}}, codes.InvalidArgument},
		{"ends_early", []*repb.RegisterChunkMappingRequest{first, {ChunkDigests: chunks[:2]}}, codes.InvalidArgument},
		{"bad_instance", []*repb.RegisterChunkMappingRequest{{InstanceName: "\x00chunks/kept/", BlobDigest: d.Proto(), DigestFunction: repb.DigestFunction_SHA256, ChunkDigests: chunks}}, codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := f.splices
			_, err := register(t, s, c.reqs...)
			wantCode(t, "RegisterChunkMapping", err, c.want)
			if c.want != codes.OK {
				if f.splices != before {
					t.Error("the store was asked")
				}
				return
			}
			if f.of != d || f.spliced.Function != blob.ChunkRepMaxCDC || !slices.Equal(f.spliced.Chunks, ds) {
				t.Errorf("the store got %d chunks of %s by %d", len(f.spliced.Chunks), f.of, f.spliced.Function)
			}
		})
	}
	// A client that leaves commits nothing.
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := s.cas.RegisterChunkMapping(ctx)
	if err == nil {
		err = stream.Send(&repb.RegisterChunkMappingRequest{BlobDigest: d.Proto(), DigestFunction: repb.DigestFunction_SHA256, ChunkDigests: chunks})
	}
	if err != nil {
		t.Fatal(err)
	}
	before := f.splices
	cancel()
	if _, err := stream.CloseAndRecv(); gstatus.Code(err) != codes.Canceled || f.splices != before {
		t.Errorf("cancelled: %v", err)
	}
}

// FuzzSplice: whatever a client sends, it gets a status that is its own fault, or
// the blob is what its chunks are.
func FuzzSplice(f *testing.F) {
	store := openChunked(f)
	s := startOver(f, store, rpc.Options{})
	data := [][]byte{[]byte("a"), []byte("bc"), bytes.Repeat([]byte("d"), 5000)}
	for _, part := range data {
		if err := blob.ReceiveBytes(f.Context(), store, of(part), part); err != nil {
			f.Fatal(err)
		}
	}
	f.Add([]byte{0, 1, 2}, uint8(0), int64(0), true)
	f.Add([]byte{2, 2, 7, 0}, uint8(1), int64(-1), false)
	f.Add([]byte{}, uint8(1), int64(1<<62), false)
	f.Fuzz(func(t *testing.T, which []byte, fn uint8, size int64, right bool) {
		if len(which) > 1000 {
			return
		}
		var chunks []*repb.Digest
		var whole []byte
		for _, w := range which {
			switch part := int(w) % 8; {
			case part < len(data):
				chunks = append(chunks, of(data[part]).Proto())
				whole = append(whole, data[part]...)
			case part == 3:
				chunks = append(chunks, nil)
			case part == 4:
				chunks = append(chunks, &repb.Digest{Hash: of(data[0]).Hash(), SizeBytes: size})
			case part == 5:
				chunks = append(chunks, digest.Empty(digest.SHA256).Proto())
			default:
				chunks = append(chunks, of([]byte{w}).Proto())
			}
		}
		d := of(whole).Proto()
		if !right {
			d.SizeBytes = size
		}
		req := &repb.SpliceBlobRequest{BlobDigest: d, ChunkDigests: chunks, DigestFunction: repb.DigestFunction_Value(fn % 12), ChunkingFunction: repb.ChunkingFunction_Value(fn)}
		_, err := s.cas.SpliceBlob(t.Context(), req)
		_, err2 := register(t, s, &repb.RegisterChunkMappingRequest{
			BlobDigest: d, ChunkDigests: chunks, DigestFunction: repb.DigestFunction_SHA256, ChunkingFunction: req.ChunkingFunction,
		})
		for _, err := range []error{err, err2} {
			switch gstatus.Code(err) {
			case codes.OK:
				if got, rerr := blob.ReadAll(t.Context(), store, of(whole), 1<<30); rerr != nil || !bytes.Equal(got, whole) {
					t.Fatalf("%d chunks became another blob: %v", len(chunks), rerr)
				}
			case codes.InvalidArgument, codes.NotFound:
			default:
				t.Fatalf("%d chunks: %v", len(chunks), err)
			}
		}
	})
}
