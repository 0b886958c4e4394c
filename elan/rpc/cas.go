package rpc

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/status"
	"github.com/mettle-build/mettle/elan/wire"
)

// responseOverhead is what a blob's reply in a batch takes beside its bytes:
// a hash of up to 128 digits, a size, a status of success, and the tags.
const responseOverhead = 160

// minResponse is what the reply about a blob in a batch takes at the least: a hash of
// 40 digits, a size, and a status of success.
const minResponse = 48

// maxStatusBytes bounds the error messages in the reply to a batch, so that
// thousands of failures do not make it larger than a message may be. The codes
// are always there.
const maxStatusBytes = 64 << 10

// casServer is the ContentAddressableStorage.
type casServer struct {
	repb.UnimplementedContentAddressableStorageServer
	o     Options
	codec *codec

	longLists chan struct{} // has a value for each stream with a long list of chunks
}

// findMissingBlobs asks the store once, however many blobs are asked for.
func (s *casServer) findMissingBlobs(ctx context.Context, req *wire.FindMissingRequest) (*wire.FindMissingResponse, error) {
	store, err := s.o.storeOf(req.InstanceName)
	if err != nil {
		return nil, status.From(err)
	}
	asked := req.Digests()
	ds := make([]digest.Digest, 0, len(asked))
	r := digests{named: req.DigestFunction}
	for _, m := range asked {
		d, err := r.read(m)
		if err != nil {
			return nil, status.From(err)
		}
		ds = append(ds, d)
	}
	if len(ds) == 0 {
		return &wire.FindMissingResponse{}, nil
	}
	missing, err := store.FindMissing(ctx, ds)
	if err != nil {
		return nil, status.FromRead(err)
	}
	named := make([]wire.Digest, len(missing))
	for i, d := range missing {
		named[i] = wire.Digest{Hash: d.Hash(), SizeBytes: d.Size()}
	}
	return wire.NewFindMissingResponse(named), nil
}

// batchUpdateBlobs verifies and stores each blob for itself.
func (s *casServer) batchUpdateBlobs(ctx context.Context, req *wire.BatchUpdateRequest) (*wire.BatchUpdateResponse, error) {
	store, err := s.o.storeOf(req.InstanceName)
	if err != nil {
		return nil, status.From(err)
	}
	blobs := req.Blobs()
	if limit := s.o.maxReply(); int64(len(blobs))*minResponse > limit {
		return nil, gstatus.Errorf(codes.InvalidArgument, "the reply about %d blobs would be over the message limit of %d bytes; send fewer at once", len(blobs), limit)
	}
	total := int64(0)
	for _, b := range blobs {
		n := int64(len(b.Data))
		if b.Compressor != repb.Compressor_IDENTITY {
			// The limit is on the blobs as they are: they are to be in memory.
			n = max(n, min(b.Digest.SizeBytes, s.o.MaxBatchBytes+1))
		}
		if total += n; total > s.o.MaxBatchBytes {
			return nil, gstatus.Errorf(codes.InvalidArgument, "the blobs of the batch have more than the %d bytes that are taken at once; write larger ones by ByteStream", s.o.MaxBatchBytes)
		}
	}
	resp := &wire.BatchUpdateResponse{Results: make([]wire.BatchResult, len(blobs))}
	parallel(len(blobs), func(i int) {
		b := &blobs[i]
		resp.Results[i] = wire.BatchResult{Digest: b.Digest, HasDigest: b.HasDigest}
		if err := s.update(ctx, store, req.DigestFunction, b); err != nil {
			resp.Results[i].Status = status.Proto(err)
		}
	})
	room := maxStatusBytes
	for _, r := range resp.Results {
		room = shorten(r.Status, room)
	}
	return resp, nil
}

func (s *casServer) update(ctx context.Context, store blob.Creator, named repb.DigestFunction_Value, b *wire.BatchedBlob) error {
	if !b.HasDigest {
		return fmt.Errorf("%w: the digest is absent", digest.ErrInvalid)
	}
	r := digests{named: named}
	d, err := r.read(b.Digest)
	if err != nil {
		return err
	}
	if err := checkCompressor(b.Compressor); err != nil {
		return err
	}
	if err := checkSize(s.o, d); err != nil {
		return err
	}
	if b.Compressor != repb.Compressor_IDENTITY {
		return s.codec.receiveBytes(ctx, store, d, b.Data)
	}
	return blob.ReceiveBytes(ctx, store, d, b.Data) //nolint:wrapcheck // it says what was received
}

// batchReadBlobs reads each blob for itself, and answers in the order asked. It
// compresses those that it is worthwhile for, where the client takes them so.
func (s *casServer) batchReadBlobs(ctx context.Context, req *wire.BatchReadRequest) (*wire.BatchReadResponse, error) {
	store, err := s.o.storeOf(req.InstanceName)
	if err != nil {
		return nil, status.From(err)
	}
	ds := req.BlobDigests()
	total := int64(0)
	limit := s.o.maxReply()
	message := limit - int64(len(ds))*responseOverhead
	for _, d := range ds {
		// What is negative is refused below; sums of what is huge may not overflow.
		total += min(max(d.SizeBytes, 0), s.o.MaxBatchBytes+1)
		if total > s.o.MaxBatchBytes {
			return nil, gstatus.Errorf(codes.InvalidArgument, "the blobs of the batch have more than the %d bytes that are read at once; read larger ones by ByteStream", s.o.MaxBatchBytes)
		}
	}
	if total > message {
		return nil, gstatus.Errorf(codes.InvalidArgument, "the reply with %d blobs of %d bytes would be over the message limit of %d bytes; ask for fewer at once", len(ds), total, limit)
	}
	resp := wire.NewBatchReadResponse(s.o.pool, ds)
	compressed := slices.Contains(req.AcceptableCompressors, repb.Compressor_ZSTD)
	parallel(len(ds), func(i int) {
		room := resp.Room(i)
		if err := s.read(ctx, store, req.DigestFunction, ds[i], room); err != nil {
			resp.SetStatus(i, readStatus(err))
			return
		}
		if compressed {
			if n := s.codec.compressBatched(room); n < len(room) {
				resp.SetCompressed(i, n, repb.Compressor_ZSTD)
			}
		}
	})
	room := maxStatusBytes
	for r := range resp.Statuses {
		room = shorten(r, room)
	}
	return resp, nil
}

// read fills data with the blob m, whose size it has.
func (s *casServer) read(ctx context.Context, store blob.Opener, named repb.DigestFunction_Value, m wire.Digest, data []byte) error {
	r := digests{named: named}
	d, err := r.read(m)
	if err != nil {
		return err
	}
	err = blob.ReadInto(ctx, store, d, data)
	s.o.reads.count(err)
	return err //nolint:wrapcheck // it says what was read
}

// readStatus is the status of reading one blob of a batch.
func readStatus(err error) *spb.Status { return status.Proto(status.FromRead(err)) }

// shorten drops the message of s where room, in bytes, has no place for it, and
// returns what is left of room.
func shorten(s *spb.Status, room int) int {
	if s == nil {
		return room
	}
	if len(s.Message) > room {
		s.Message = ""
	}
	return room - len(s.Message)
}

// parallel calls f with each of 0 to n-1, several at a time, and returns when
// all have been.
func parallel(n int, f func(i int)) {
	if n == 1 {
		f(0)
		return
	}
	var next atomic.Int64
	work := func() {
		for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
			f(int(i))
		}
	}
	// The caller takes part: with a store that answers at once, it has done a few
	// before another goroutine begins.
	var wg sync.WaitGroup
	for range min(n, defaultParallel) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
}

// checkSize refuses a blob that is over the configured limit.
func checkSize(o Options, d digest.Digest) error {
	if o.MaxBlobBytes > 0 && d.Size() > o.MaxBlobBytes {
		return fmt.Errorf("blob %s: %w: at most %d bytes are taken", d, blob.ErrTooLarge, o.MaxBlobBytes)
	}
	return nil
}
