package conform

import (
	"context"
	"fmt"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
)

const (
	compressedWrite = "`{instance_name}/uploads/{uuid}/compressed-blobs/{compressor}/{digest_function/}{uncompressed_hash}/{uncompressed_size}{/optional_metadata}`"
	compressedRead  = "`{instance_name}/compressed-blobs/{compressor}/{digest_function/}{uncompressed_hash}/{uncompressed_size}`"
	everyForm       = "Servers MUST be able to provide data for all recently advertised blobs in each of the compression formats that the server supports, as well as in uncompressed form."
	verified        = "Servers MUST verify that these match the uploaded data once uncompressed, and MUST return an `INVALID_ARGUMENT` error in the case of mismatch."
)

//nolint:revive // a table
func compressedCases() []Case {
	zstd := []need{needsZstd}
	mixed := func(t *T) []byte { return slices.Concat(make([]byte, 100_000), t.bytes(100_000), make([]byte, 50_000)) }
	return []Case{
		{Name: "compressed/write_and_read", Clause: compressedWrite, Needs: zstd, run: func(ctx context.Context, t *T) {
			data := mixed(t)
			d := t.digest(data)
			sent := t.compressed(data)
			r, err := t.write(ctx, t.zstdWriteName(d), parts(sent, 16<<10)...)
			t.ok("Write of zstd", err)
			if r.CommittedSize != int64(len(sent)) && r.CommittedSize != -1 {
				t.errorf("committed_size is %d, want the %d compressed bytes, or -1", r.CommittedSize, len(sent))
			}
			got, err := t.read(ctx, t.zstdReadName(d), 0, 0)
			t.ok("Read of zstd", err)
			t.same("Read of zstd", t.decompressed(got), data)
		}},
		{Name: "compressed/stored_plain_read_zstd", Clause: everyForm, Needs: zstd, run: func(ctx context.Context, t *T) {
			data := mixed(t)
			got, err := t.read(ctx, t.zstdReadName(t.put(ctx, data)), 0, 0)
			t.ok("Read of zstd", err)
			t.same("Read of zstd", t.decompressed(got), data)
		}},
		{Name: "compressed/stored_zstd_read_plain", Clause: everyForm, Needs: zstd, run: func(ctx context.Context, t *T) {
			data := mixed(t)
			d := t.digest(data)
			_, err := t.write(ctx, t.zstdWriteName(d), parts(t.compressed(data), 100_000)...)
			t.ok("Write of zstd", err)
			got, err := t.read(ctx, t.readName(d), 0, 0)
			t.ok("Read", err)
			t.same("Read", got, data)
		}},
		{Name: "compressed/read_offset", Clause: "`ReadRequest.read_offset` refers to the offset in the uncompressed form of the blob.", Needs: zstd, run: func(ctx context.Context, t *T) {
			data := mixed(t)
			name := t.zstdReadName(t.put(ctx, data))
			for _, offset := range []int64{1, 100_001, 249_999} {
				got, err := t.read(ctx, name, offset, 0)
				t.ok(fmt.Sprintf("Read of zstd from %d", offset), err)
				t.same(fmt.Sprintf("Read of zstd from %d", offset), t.decompressed(got), data[offset:])
			}
		}},
		{Name: "compressed/read_limit", Clause: "Servers MUST return `INVALID_ARGUMENT` if `ReadRequest.read_limit` is non-zero.", Needs: zstd, run: func(ctx context.Context, t *T) {
			_, err := t.read(ctx, t.zstdReadName(t.put(ctx, mixed(t))), 0, 10)
			t.want("Read of zstd with a limit", err, codes.InvalidArgument)
		}},
		{Name: "compressed/absent", Clause: compressedRead, Needs: zstd, run: func(ctx context.Context, t *T) {
			_, err := t.read(ctx, t.zstdReadName(t.fresh()), 0, 0)
			t.want("Read of what is not there", err, codes.NotFound)
		}},
		{Name: "compressed/empty_blob", Clause: emptyClause, Needs: zstd, run: func(ctx context.Context, t *T) {
			got, err := t.read(ctx, t.zstdReadName(t.digest(nil)), 0, 0)
			t.ok("Read of the empty blob in zstd", err)
			t.same("the empty blob", t.decompressed(got), nil)
		}},
		{Name: "compressed/wrong_content", Clause: verified, Needs: zstd, run: func(ctx context.Context, t *T) {
			d := t.digest(t.bytes(5000))
			_, err := t.write(ctx, t.zstdWriteName(d), parts(t.compressed(t.bytes(5000)), 1000)...)
			t.want("Write of other bytes in zstd", err, codes.InvalidArgument)
			if !t.isMissing(ctx, d) {
				t.errorf("the digest of other bytes is there afterwards")
			}
		}},
		{Name: "compressed/garbage", Clause: verified, Needs: zstd, run: func(ctx context.Context, t *T) {
			data := t.bytes(5000)
			_, err := t.write(ctx, t.zstdWriteName(t.digest(data)), parts(data, 1000)...)
			t.want("Write of bytes that are no zstd", err, codes.InvalidArgument)
		}},
		{Name: "compressed/cut_off", Clause: verified, Needs: zstd, run: func(ctx context.Context, t *T) {
			data := mixed(t)
			sent := t.compressed(data)
			_, err := t.write(ctx, t.zstdWriteName(t.digest(data)), parts(sent[:len(sent)-10], 10_000)...)
			t.want("Write of zstd without its end", err, codes.InvalidArgument)
		}},
		{Name: "compressed/bomb", Clause: verified, Needs: zstd, run: func(ctx context.Context, t *T) {
			d := t.digest(t.bytes(100))
			_, err := t.write(ctx, t.zstdWriteName(d), parts(t.compressed(make([]byte, 64<<20)), 10_000)...)
			t.want("Write of 64 MiB of zeros as a blob of 100 bytes", err, codes.InvalidArgument)
		}},
		{Name: "compressed/again", Clause: alreadyThere, Needs: zstd, run: func(ctx context.Context, t *T) {
			data := mixed(t)
			t.put(ctx, data)
			sent := t.compressed(data)
			r, err := t.write(ctx, t.zstdWriteName(t.digest(data)), parts(sent, 16<<10)...)
			t.ok("Write of what is there", err)
			if r.CommittedSize != -1 && r.CommittedSize != int64(len(sent)) {
				t.errorf("committed_size is %d, want -1", r.CommittedSize)
			}
		}},
		{Name: "compressed/unknown_compressor", Clause: compressedRead, run: func(ctx context.Context, t *T) {
			if slices.Contains(t.caps.GetCacheCapabilities().GetSupportedCompressors(), repb.Compressor_BROTLI) {
				t.skipf("the server announces Brotli")
			}
			d := t.put(ctx, t.bytes(100))
			_, err := t.read(ctx, fmt.Sprintf("%scompressed-blobs/brotli/%s%s/100", t.prefix(), t.named(), d.Hash), 0, 0)
			t.want("Read in a compressor that is not announced", err, codes.InvalidArgument, codes.Unimplemented, codes.NotFound)
		}},
		{Name: "compressed/stored_plain_read_in_batch", Clause: everyForm, Needs: zstd, run: func(ctx context.Context, t *T) {
			data := t.bytes(500)
			d := t.digest(data)
			_, err := t.write(ctx, t.zstdWriteName(d), parts(t.compressed(data), 100)...)
			t.ok("Write of zstd", err)
			t.same("BatchReadBlobs", t.batchRead(ctx, nil, d)[0].GetData(), data)
		}},
	}
}

func chunkCases() []Case {
	old, streamed := []need{needsChunks, needsVersion(12)}, []need{needsChunks, needsVersion(13)}
	const (
		concatenation = "Concatenating the blob chunks in the order of the digest list returned by the server results in the original blob."
		stored        = "The blob chunks are stored in CAS."
		noChunk       = "At least one of the blob chunks is not present in the CAS."
		otherDigest   = "The digest of the spliced blob is different from the provided expected digest"
	)
	return []Case{
		{Name: "chunks/split", Clause: concatenation, Needs: old, run: func(ctx context.Context, t *T) {
			data := t.bytes(6 << 20)
			r, err := t.calls.cas.SplitBlob(ctx, &repb.SplitBlobRequest{InstanceName: t.o.Instance, BlobDigest: t.put(ctx, data), DigestFunction: t.function()})
			t.ok("SplitBlob", err)
			t.same("the chunks, one after the other", t.concatenated(ctx, r.ChunkDigests), data)
		}},
		{Name: "chunks/mapping", Clause: concatenation, Needs: streamed, run: func(ctx context.Context, t *T) {
			data := t.bytes(6 << 20)
			ds, err := t.mapping(ctx, t.put(ctx, data))
			t.ok("GetChunkMapping", err)
			t.same("the chunks, one after the other", t.concatenated(ctx, ds), data)
		}},
		{Name: "chunks/are_there", Clause: stored, Needs: streamed, run: func(ctx context.Context, t *T) {
			ds, err := t.mapping(ctx, t.put(ctx, t.bytes(6<<20)))
			t.ok("GetChunkMapping", err)
			if m := t.missing(ctx, ds...); len(m) > 0 {
				t.errorf("%d of %d chunks are missing", len(m), len(ds))
			}
		}},
		{Name: "chunks/split_absent", Clause: "The requested blob is not present in the CAS, OR there is no split information available for the blob", Needs: streamed, run: func(ctx context.Context, t *T) {
			_, err := t.mapping(ctx, t.fresh())
			t.want("GetChunkMapping of what is not there", err, codes.NotFound)
		}},
		{Name: "chunks/register", Clause: "RegisterChunkMapping registers an ordered chunk-digest mapping for a blob.", Needs: streamed, run: func(ctx context.Context, t *T) {
			a, b := t.bytes(700_000), t.bytes(600_000)
			whole := slices.Concat(a, b, a)
			da, db := t.put(ctx, a), t.put(ctx, b)
			r, err := t.register(ctx, t.digest(whole), []*repb.Digest{da}, nil, []*repb.Digest{db, da})
			t.ok("RegisterChunkMapping", err)
			if r.GetBlobDigest().GetHash() != t.digest(whole).Hash {
				t.errorf("blob_digest is %v, want %v", r.GetBlobDigest(), t.digest(whole))
			}
			got, err := t.read(ctx, t.readName(t.digest(whole)), 0, 0)
			t.ok("Read", err)
			t.same("Read", got, whole)
		}},
		{Name: "chunks/register_missing_chunk", Clause: noChunk, Needs: streamed, run: func(ctx context.Context, t *T) {
			a, b := t.bytes(1000), t.bytes(1000)
			_, err := t.register(ctx, t.digest(slices.Concat(a, b)), []*repb.Digest{t.put(ctx, a), t.digest(b)})
			t.want("RegisterChunkMapping with a chunk that is not there", err, codes.NotFound)
		}},
		{Name: "chunks/register_wrong_digest", Clause: "If the client-specified blob is not already in the CAS, the server MUST verify that the digest of the newly created blob assembled from chunks matches the digest specified by the client, and reject the request if they differ.", Needs: streamed, run: func(ctx context.Context, t *T) {
			a, b := t.bytes(1000), t.bytes(1000)
			d := t.digest(t.bytes(2000))
			_, err := t.register(ctx, d, []*repb.Digest{t.put(ctx, a), t.put(ctx, b)})
			t.want("RegisterChunkMapping as another blob", err, codes.InvalidArgument)
			if !t.isMissing(ctx, d) {
				t.errorf("the other blob is there afterwards")
			}
		}},
		{Name: "chunks/register_without_digest", Clause: "Clients MUST set the expected blob digest on the first request", Needs: streamed, run: func(ctx context.Context, t *T) {
			_, err := t.register(ctx, nil, []*repb.Digest{t.put(ctx, t.bytes(1000))})
			t.want("RegisterChunkMapping without a digest", err, codes.InvalidArgument)
		}},
		{Name: "chunks/splice", Clause: "then use this API to store information on how the chunks compose the original blob.", Needs: old, run: func(ctx context.Context, t *T) {
			a, b := t.bytes(1000), t.bytes(3000)
			whole := slices.Concat(a, b)
			_, err := t.calls.cas.SpliceBlob(ctx, &repb.SpliceBlobRequest{
				InstanceName: t.o.Instance, BlobDigest: t.digest(whole), ChunkDigests: []*repb.Digest{t.put(ctx, a), t.put(ctx, b)}, DigestFunction: t.fn.Proto(),
			})
			t.ok("SpliceBlob", err)
			if t.isMissing(ctx, t.digest(whole)) {
				t.errorf("the blob is missing afterwards")
			}
		}},
		{Name: "chunks/splice_wrong_digest", Clause: otherDigest, Needs: old, run: func(ctx context.Context, t *T) {
			_, err := t.calls.cas.SpliceBlob(ctx, &repb.SpliceBlobRequest{
				InstanceName: t.o.Instance, BlobDigest: t.digest(t.bytes(1000)), ChunkDigests: []*repb.Digest{t.put(ctx, t.bytes(1000))}, DigestFunction: t.fn.Proto(),
			})
			t.want("SpliceBlob as another blob", err, codes.InvalidArgument)
		}},
	}
}

// mapping is the chunks of a blob.
func (t *T) mapping(ctx context.Context, d *repb.Digest) ([]*repb.Digest, error) {
	s, err := t.calls.cas.GetChunkMapping(ctx, &repb.GetChunkMappingRequest{InstanceName: t.o.Instance, BlobDigest: d, DigestFunction: t.fn.Proto()})
	if err != nil {
		return nil, err
	}
	var ds []*repb.Digest
	for r, err := range messages(s.Recv) {
		if err != nil {
			return ds, err
		}
		ds = append(ds, r.ChunkDigests...)
	}
	return ds, nil
}

// register registers a blob's chunks, in several messages.
func (t *T) register(ctx context.Context, d *repb.Digest, chunks ...[]*repb.Digest) (*repb.RegisterChunkMappingResponse, error) {
	s, err := t.calls.cas.RegisterChunkMapping(ctx)
	if err != nil {
		return nil, err
	}
	for i, ds := range chunks {
		m := &repb.RegisterChunkMappingRequest{ChunkDigests: ds}
		if i == 0 {
			m.InstanceName, m.BlobDigest, m.DigestFunction = t.o.Instance, d, t.fn.Proto()
		}
		if s.Send(m) != nil {
			break // the response says why
		}
	}
	return s.CloseAndRecv()
}

// concatenated reads chunks, in their order.
func (t *T) concatenated(ctx context.Context, ds []*repb.Digest) []byte {
	var all []byte
	for _, d := range ds {
		data, err := t.read(ctx, t.readName(d), 0, 0)
		t.ok("Read of a chunk", err)
		all = append(all, data...)
	}
	return all
}
