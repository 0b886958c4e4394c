package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/status"
)

const (
	// pageChunks are sent in one message of GetChunkMapping: 600 KB with SHA256,
	// 1.2 MB with SHA512.
	pageChunks = 8192
	// fewChunks is up to how many a client of RegisterChunkMapping may send without
	// a slot: those of a blob of 8 GiB, in 2 MiB of memory.
	fewChunks = 16 << 10
	// maxLongLists is how many streams may have sent more; others wait. It makes for
	// some 500 MB at the very worst.
	maxLongLists = 8
)

// chunker finds the ability behind the calls of this file.
func (o *Options) chunker(instance string) (blob.Chunker, error) {
	store, err := o.storeOf(instance)
	if err != nil {
		return nil, status.From(err)
	}
	if c, ok := blob.As[blob.Chunker](store); ok && c.ChunkParams().MaxChunks > 0 {
		return c, nil
	}
	return nil, gstatus.Error(codes.Unimplemented, "this server keeps no chunks: split_blob_support and splice_blob_support are false")
}

// SplitBlob is GetChunkMapping as it was in 2.12, in one message.
func (s *casServer) SplitBlob(ctx context.Context, req *repb.SplitBlobRequest) (*repb.SplitBlobResponse, error) {
	d, l, err := s.split(ctx, req)
	if err != nil {
		return nil, err
	}
	if n := len(l.Chunks) * digestBytes(d.Function()); n > s.o.MaxMessageBytes {
		// The code for where there is no split information: clients then read the
		// blob as it is.
		return nil, gstatus.Errorf(codes.NotFound, "the %d chunks of blob %s do not fit into one message: use GetChunkMapping, or read it whole", len(l.Chunks), d)
	}
	return &repb.SplitBlobResponse{ChunkDigests: protos(l.Chunks), ChunkingFunction: chunkFunctionProto(l.Function)}, nil
}

// digestBytes is what a Digest takes in a message, at most.
func digestBytes(fn digest.Function) int { return fn.HexLen() + 20 }

// GetChunkMapping tells in which chunks a blob can be had, all of which are there.
func (s *casServer) GetChunkMapping(req *repb.GetChunkMappingRequest, stream grpc.ServerStreamingServer[repb.GetChunkMappingResponse]) error {
	if req.DigestFunction == repb.DigestFunction_UNKNOWN {
		return gstatus.Error(codes.InvalidArgument, "digest_function is not set, which this call requires")
	}
	_, l, err := s.split(stream.Context(), req)
	if err != nil {
		return err
	}
	page := &repb.GetChunkMappingResponse{ChunkingFunction: chunkFunctionProto(l.Function)}
	for {
		n := min(len(l.Chunks), pageChunks)
		page.ChunkDigests = protos(l.Chunks[:n])
		if err := stream.Send(page); err != nil {
			return err //nolint:wrapcheck // a status already
		}
		if l.Chunks = l.Chunks[n:]; len(l.Chunks) == 0 {
			return nil
		}
		page = &repb.GetChunkMappingResponse{}
	}
}

// chunkRequest is what the requests of all four calls have.
type chunkRequest interface {
	GetInstanceName() string
	GetBlobDigest() *repb.Digest
	GetDigestFunction() repb.DigestFunction_Value
	GetChunkingFunction() repb.ChunkingFunction_Value
}

func (s *casServer) split(ctx context.Context, req chunkRequest) (d digest.Digest, l blob.ChunkList, err error) {
	chunker, err := s.o.chunker(req.GetInstanceName())
	if err != nil {
		return d, l, err
	}
	d, err = readDigest(req.GetDigestFunction(), req.GetBlobDigest())
	if err != nil {
		return d, l, status.From(err)
	}
	l, err = chunker.Split(ctx, d, chunkFunction(req.GetChunkingFunction()))
	return d, l, status.FromRead(err)
}

// SpliceBlob is RegisterChunkMapping as it was in 2.12, in one message.
func (s *casServer) SpliceBlob(ctx context.Context, req *repb.SpliceBlobRequest) (*repb.SpliceBlobResponse, error) {
	sp, err := s.newSplice(req)
	if err == nil {
		err = sp.add(req.ChunkDigests)
	}
	if err == nil {
		err = sp.commit(ctx)
	}
	if err != nil {
		return nil, err
	}
	return &repb.SpliceBlobResponse{BlobDigest: sp.d.Proto()}, nil
}

// RegisterChunkMapping makes a blob of chunks. What the messages after the first
// say beside their chunks does not count.
func (s *casServer) RegisterChunkMapping(stream grpc.ClientStreamingServer[repb.RegisterChunkMappingRequest, repb.RegisterChunkMappingResponse]) error {
	var sp *splice
	defer func() {
		if sp != nil && sp.long {
			<-s.longLists
		}
	}()
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err //nolint:wrapcheck // a status already
		}
		if sp == nil {
			if sp, err = s.newSplice(req); err != nil {
				return err
			}
			if req.DigestFunction == repb.DigestFunction_UNKNOWN {
				return gstatus.Error(codes.InvalidArgument, "the first request does not set digest_function, which this call requires")
			}
		}
		if !sp.long && len(sp.l.Chunks)+len(req.ChunkDigests) > fewChunks {
			select {
			case s.longLists <- struct{}{}:
				sp.long = true
			case <-stream.Context().Done():
				return status.From(stream.Context().Err())
			}
		}
		if err := sp.add(req.ChunkDigests); err != nil {
			return err
		}
	}
	if sp == nil {
		return gstatus.Error(codes.InvalidArgument, "the stream ended without a request")
	}
	if err := sp.commit(stream.Context()); err != nil {
		return err
	}
	return stream.SendAndClose(&repb.RegisterChunkMappingResponse{BlobDigest: sp.d.Proto()}) //nolint:wrapcheck // a status already
}

// splice is a blob in chunks, as far as it has come.
type splice struct {
	chunker blob.Chunker
	d       digest.Digest
	l       blob.ChunkList
	left    int64 // bytes of d that are in no chunk yet
	max     int   // chunks
	long    bool  // it has a slot
}

func (s *casServer) newSplice(req chunkRequest) (*splice, error) {
	chunker, err := s.o.chunker(req.GetInstanceName())
	if err != nil {
		return nil, err
	}
	d, err := readDigest(req.GetDigestFunction(), req.GetBlobDigest())
	if err == nil {
		err = checkSize(s.o, d)
	}
	if err != nil {
		return nil, status.From(err)
	}
	return &splice{
		chunker: chunker, d: d, l: blob.ChunkList{Function: chunkFunction(req.GetChunkingFunction())},
		left: d.Size(), max: chunker.ChunkParams().MaxChunks,
	}, nil
}

// add takes the next chunks. What can't become the blob is refused at once.
func (sp *splice) add(ms []*repb.Digest) error {
	if len(ms) > sp.max-len(sp.l.Chunks) {
		return gstatus.Errorf(codes.InvalidArgument, "blob %s: more than %d chunks, which is the limit", sp.d, sp.max)
	}
	for _, m := range ms {
		c, err := digest.FromProto(sp.d.Function(), m)
		if err != nil {
			return status.From(fmt.Errorf("chunk %d of blob %s: %w", len(sp.l.Chunks), sp.d, err))
		}
		if c.Size() > sp.left {
			return gstatus.Errorf(codes.InvalidArgument, "blob %s: its chunks have more bytes than it", sp.d)
		}
		sp.left -= c.Size()
		sp.l.Chunks = append(sp.l.Chunks, c)
	}
	return nil
}

// commit makes the blob.
func (sp *splice) commit(ctx context.Context) error {
	if sp.left > 0 {
		return gstatus.Errorf(codes.InvalidArgument, "blob %s: its chunks have %d bytes less than it", sp.d, sp.left)
	}
	return status.From(sp.chunker.Splice(ctx, sp.d, sp.l))
}

// chunkFunction is UNKNOWN for what a later version of the API may add: the
// preference may be disregarded, and chunks are verified whoever cut them.
func chunkFunction(v repb.ChunkingFunction_Value) blob.ChunkFunction {
	switch v {
	case repb.ChunkingFunction_FAST_CDC_2020:
		return blob.ChunkFastCDC2020
	case repb.ChunkingFunction_REP_MAX_CDC:
		return blob.ChunkRepMaxCDC
	default:
		return blob.ChunkUnknown
	}
}

func chunkFunctionProto(fn blob.ChunkFunction) repb.ChunkingFunction_Value {
	switch fn {
	case blob.ChunkFastCDC2020:
		return repb.ChunkingFunction_FAST_CDC_2020
	case blob.ChunkRepMaxCDC:
		return repb.ChunkingFunction_REP_MAX_CDC
	default:
		return repb.ChunkingFunction_UNKNOWN
	}
}

func protos(ds []digest.Digest) []*repb.Digest {
	ms := make([]*repb.Digest, len(ds))
	for i, d := range ds {
		ms[i] = d.Proto()
	}
	return ms
}

// announceChunks fills in what Capabilities say of all that.
func announceChunks(c *repb.CacheCapabilities, p blob.ChunkParams) {
	c.SplitBlobSupport, c.SpliceBlobSupport = true, true
	c.FastCdc_2020Params = &repb.FastCdc2020Params{
		AvgChunkSizeBytes: uint64(p.FastCDCAverageBytes), //nolint:gosec // above 0
		Seed:              p.FastCDCSeed,
	}
	c.RepMaxCdcParams = &repb.RepMaxCdcParams{
		MinChunkSizeBytes: uint64(p.RepMaxCDCMinimumBytes), //nolint:gosec // above 0
		HorizonSizeBytes:  uint64(p.RepMaxCDCHorizonBytes), //nolint:gosec // not negative
	}
}
