package rpc_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"

	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/chunk"
	"github.com/mettle-build/mettle/elan/digest"
)

// chunkClient moves blobs in chunks, as Bazel does: it keeps the chunks that it
// has seen.
type chunkClient struct {
	tb  *testing.T
	s   *server
	fn  repb.ChunkingFunction_Value
	cut chunk.Function
	new bool // by the calls of 2.13

	local    map[digest.Digest][]byte
	up, down int64 // bytes of chunks
}

// newChunkClient cuts as the server's Capabilities say.
func newChunkClient(tb *testing.T, s *server, fn repb.ChunkingFunction_Value, newCalls bool) *chunkClient {
	tb.Helper()
	caps, err := s.capabilities.GetCapabilities(tb.Context(), &repb.GetCapabilitiesRequest{})
	if err != nil {
		tb.Fatal(err)
	}
	cc := caps.CacheCapabilities
	if v := caps.HighApiVersion; v.Minor < 13 || !cc.SplitBlobSupport || !cc.SpliceBlobSupport {
		tb.Fatalf("no chunks: %v", caps)
	}
	c := &chunkClient{tb: tb, s: s, fn: fn, new: newCalls, local: map[digest.Digest][]byte{}}
	if fn == repb.ChunkingFunction_FAST_CDC_2020 {
		c.cut, err = chunk.NewFastCDC(int(cc.FastCdc_2020Params.AvgChunkSizeBytes), cc.FastCdc_2020Params.Seed)
	} else {
		c.cut, err = chunk.NewRepMaxCDC(int(cc.RepMaxCdcParams.MinChunkSizeBytes), int(cc.RepMaxCdcParams.HorizonSizeBytes))
	}
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// upload makes data a blob of the server, and returns the number of its chunks,
// and of those that moved.
func (c *chunkClient) upload(data []byte) (total, moved int) {
	c.tb.Helper()
	var ds []*repb.Digest
	for part := range chunk.Chunks(c.cut, data) {
		d := of(part)
		c.local[d] = part
		ds = append(ds, d.Proto())
	}
	missing, err := c.s.cas.FindMissingBlobs(c.tb.Context(), &repb.FindMissingBlobsRequest{BlobDigests: ds})
	if err != nil {
		c.tb.Fatal(err)
	}
	for _, m := range missing.MissingBlobDigests {
		d := digestOf(c.tb, m)
		write(c.tb, c.s, d, c.local[d])
		c.up += d.Size()
	}
	if got := c.splice(of(data), ds); got.Hash != of(data).Hash() || got.SizeBytes != int64(len(data)) {
		c.tb.Fatalf("the server says that the blob is %v, it is %s", got, of(data))
	}
	return len(ds), len(missing.MissingBlobDigests)
}

func digestOf(tb testing.TB, m *repb.Digest) digest.Digest {
	tb.Helper()
	d, err := digest.FromProto(digest.SHA256, m)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

// write uploads a blob by ByteStream.
func write(tb testing.TB, s *server, d digest.Digest, data []byte) {
	tb.Helper()
	n, err := writeAll(tb.Context(), s.streams, "uploads/1f0e3dad-9990-4c0a-9b0b-000000000000/blobs/"+d.String(), data, 1<<20)
	if err != nil || n != d.Size() {
		tb.Fatalf("write %s: %d, %v", d, n, err)
	}
}

func (c *chunkClient) splice(d digest.Digest, chunks []*repb.Digest) *repb.Digest {
	c.tb.Helper()
	if !c.new {
		resp, err := c.s.cas.SpliceBlob(c.tb.Context(), &repb.SpliceBlobRequest{BlobDigest: d.Proto(), ChunkDigests: chunks, ChunkingFunction: c.fn})
		if err != nil {
			c.tb.Fatal(err)
		}
		return resp.BlobDigest
	}
	resp, err := register(c.tb, c.s, registerRequests(d, c.fn, chunks, 10)...)
	if err != nil {
		c.tb.Fatal(err)
	}
	return resp.BlobDigest
}

// registerRequests splits a list of chunks into requests of n each.
func registerRequests(d digest.Digest, fn repb.ChunkingFunction_Value, chunks []*repb.Digest, n int) []*repb.RegisterChunkMappingRequest {
	reqs := []*repb.RegisterChunkMappingRequest{{BlobDigest: d.Proto(), DigestFunction: d.Function().Proto(), ChunkingFunction: fn}}
	for len(chunks) > 0 {
		n := min(n, len(chunks))
		reqs = append(reqs, &repb.RegisterChunkMappingRequest{ChunkDigests: chunks[:n]})
		chunks = chunks[n:]
	}
	return reqs
}

func register(tb testing.TB, s *server, reqs ...*repb.RegisterChunkMappingRequest) (*repb.RegisterChunkMappingResponse, error) {
	tb.Helper()
	stream, err := s.cas.RegisterChunkMapping(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	for _, r := range reqs {
		if err := stream.Send(r); err != nil {
			break // CloseAndRecv tells why
		}
	}
	return stream.CloseAndRecv()
}

// mapping asks in which chunks a blob can be had, by the new call.
func mapping(tb testing.TB, s *server, req *repb.GetChunkMappingRequest) (fn repb.ChunkingFunction_Value, chunks []*repb.Digest, pages int, err error) {
	tb.Helper()
	stream, err := s.cas.GetChunkMapping(tb.Context(), req)
	if err != nil {
		tb.Fatal(err)
	}
	for ; ; pages++ {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return fn, chunks, pages, nil
		}
		if err != nil {
			return fn, nil, pages, err
		}
		if pages == 0 {
			fn = resp.ChunkingFunction
		}
		chunks = append(chunks, resp.ChunkDigests...)
	}
}

// download returns a blob of the server, and the number of its chunks, and of
// those that moved.
func (c *chunkClient) download(d digest.Digest) (data []byte, total, moved int) {
	c.tb.Helper()
	var chunks []*repb.Digest
	var err error
	if c.new {
		_, chunks, _, err = mapping(c.tb, c.s, &repb.GetChunkMappingRequest{BlobDigest: d.Proto(), DigestFunction: repb.DigestFunction_SHA256, ChunkingFunction: c.fn})
	} else {
		var resp *repb.SplitBlobResponse
		resp, err = c.s.cas.SplitBlob(c.tb.Context(), &repb.SplitBlobRequest{BlobDigest: d.Proto(), ChunkingFunction: c.fn})
		chunks = resp.GetChunkDigests()
	}
	if err != nil {
		c.tb.Fatal(err)
	}
	for _, m := range chunks {
		part := digestOf(c.tb, m)
		if part.Size() == 0 || part.Size() > int64(c.cut.MaxBytes()) {
			c.tb.Fatalf("a chunk of %d bytes, Bazel refuses those of over %d", part.Size(), c.cut.MaxBytes())
		}
		if _, ok := c.local[part]; !ok {
			got, err := c.s.read(c.tb, &bytestream.ReadRequest{ResourceName: "blobs/" + part.String()})
			if err != nil {
				c.tb.Fatal(err)
			}
			c.local[part] = got
			c.down += part.Size()
			moved++
		}
		data = append(data, c.local[part]...)
	}
	if of(data) != d {
		c.tb.Fatalf("the chunks of %s are another blob", d)
	}
	return data, len(chunks), moved
}

// edited is data with a byte put in in the middle.
func edited(data []byte) []byte {
	return bytes.Join([][]byte{data[:len(data)/2], data[len(data)/2:]}, []byte("x"))
}

func randomBlob(size int) []byte { return blobtest.Random(77, size) }
