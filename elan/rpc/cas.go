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
)

// responseOverhead is what a blob's reply in a batch takes beside its bytes:
// a hash of up to 128 digits, a size, a status of success, and the tags.
const responseOverhead = 160

// maxStatusBytes bounds the error messages in the reply to a batch, so that
// thousands of failures do not make it larger than a message may be. The codes
// are always there.
const maxStatusBytes = 64 << 10

// casServer is the ContentAddressableStorage. Splitting and splicing are not
// served, and not announced.
type casServer struct {
	repb.UnimplementedContentAddressableStorageServer
	o     Options
	codec *codec
}

// FindMissingBlobs asks the store once, however many blobs are asked for.
func (s *casServer) FindMissingBlobs(ctx context.Context, req *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
	store, err := s.o.storeOf(req.InstanceName)
	if err != nil {
		return nil, status.From(err)
	}
	ds := make([]digest.Digest, 0, len(req.BlobDigests))
	r := digests{named: req.DigestFunction}
	for _, m := range req.BlobDigests {
		d, err := r.read(m)
		if err != nil {
			return nil, status.From(err)
		}
		ds = append(ds, d)
	}
	if len(ds) == 0 {
		return &repb.FindMissingBlobsResponse{}, nil
	}
	missing, err := store.FindMissing(ctx, ds)
	if err != nil {
		return nil, status.FromRead(err)
	}
	protos := make([]*repb.Digest, len(missing))
	for i, d := range missing {
		protos[i] = d.Proto()
	}
	return &repb.FindMissingBlobsResponse{MissingBlobDigests: protos}, nil
}

// BatchUpdateBlobs verifies and stores each blob for itself.
func (s *casServer) BatchUpdateBlobs(ctx context.Context, req *repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error) {
	store, err := s.o.storeOf(req.InstanceName)
	if err != nil {
		return nil, status.From(err)
	}
	total := int64(0)
	for _, r := range req.Requests {
		n := int64(len(r.GetData()))
		if r.GetCompressor() != repb.Compressor_IDENTITY {
			// The limit is on the blobs as they are: they are to be in memory.
			n = max(n, min(r.GetDigest().GetSizeBytes(), s.o.MaxBatchBytes+1))
		}
		if total += n; total > s.o.MaxBatchBytes {
			return nil, gstatus.Errorf(codes.InvalidArgument, "the blobs of the batch have more than the %d bytes that are taken at once; write larger ones by ByteStream", s.o.MaxBatchBytes)
		}
	}
	resp := &repb.BatchUpdateBlobsResponse{Responses: make([]*repb.BatchUpdateBlobsResponse_Response, len(req.Requests))}
	parallel(len(req.Requests), func(i int) {
		r := req.Requests[i]
		resp.Responses[i] = &repb.BatchUpdateBlobsResponse_Response{
			Digest: r.Digest,
			Status: status.Proto(s.update(ctx, store, req.DigestFunction, r)),
		}
	})
	room := maxStatusBytes
	for _, r := range resp.Responses {
		room = shorten(r.Status, room)
	}
	return resp, nil
}

func (s *casServer) update(ctx context.Context, store blob.Creator, named repb.DigestFunction_Value, r *repb.BatchUpdateBlobsRequest_Request) error {
	d, err := readDigest(named, r.Digest)
	if err != nil {
		return err
	}
	if err := checkCompressor(r.Compressor); err != nil {
		return err
	}
	if err := checkSize(s.o, d); err != nil {
		return err
	}
	if r.Compressor != repb.Compressor_IDENTITY {
		return s.codec.receiveBytes(ctx, store, d, r.Data)
	}
	return blob.ReceiveBytes(ctx, store, d, r.Data) //nolint:wrapcheck // it says what was received
}

// BatchReadBlobs reads each blob for itself, and answers in the order asked. It
// compresses those that it is worthwhile for, where the client takes them so.
func (s *casServer) BatchReadBlobs(ctx context.Context, req *repb.BatchReadBlobsRequest) (*repb.BatchReadBlobsResponse, error) {
	store, err := s.o.storeOf(req.InstanceName)
	if err != nil {
		return nil, status.From(err)
	}
	total := int64(0)
	message := int64(s.o.MaxMessageBytes) - int64(len(req.Digests))*responseOverhead
	for _, d := range req.Digests {
		// What is negative is refused below; sums of what is huge may not overflow.
		total += min(max(d.GetSizeBytes(), 0), s.o.MaxBatchBytes+1)
		if total > s.o.MaxBatchBytes {
			return nil, gstatus.Errorf(codes.InvalidArgument, "the blobs of the batch have more than the %d bytes that are read at once; read larger ones by ByteStream", s.o.MaxBatchBytes)
		}
	}
	if total > message {
		return nil, gstatus.Errorf(codes.InvalidArgument, "the reply with %d blobs of %d bytes would be over the message limit of %d bytes; ask for fewer at once", len(req.Digests), total, s.o.MaxMessageBytes)
	}
	resp := &repb.BatchReadBlobsResponse{Responses: make([]*repb.BatchReadBlobsResponse_Response, len(req.Digests))}
	compressed := slices.Contains(req.AcceptableCompressors, repb.Compressor_ZSTD)
	parallel(len(req.Digests), func(i int) {
		data, err := s.read(ctx, store, req.DigestFunction, req.Digests[i])
		r := &repb.BatchReadBlobsResponse_Response{Digest: req.Digests[i], Data: data, Status: readStatus(err)}
		if compressed {
			s.codec.compressBatched(r)
		}
		resp.Responses[i] = r
	})
	room := maxStatusBytes
	for _, r := range resp.Responses {
		room = shorten(r.Status, room)
	}
	return resp, nil
}

func (s *casServer) read(ctx context.Context, store blob.Opener, named repb.DigestFunction_Value, m *repb.Digest) ([]byte, error) {
	d, err := readDigest(named, m)
	if err != nil {
		return nil, err
	}
	return blob.ReadAll(ctx, store, d, s.o.MaxBatchBytes) //nolint:wrapcheck // it says what was read
}

// readStatus is the status of reading one blob of a batch.
func readStatus(err error) *spb.Status { return status.Proto(status.FromRead(err)) }

// shorten drops the message of s where room, in bytes, has no place for it, and
// returns what is left of room.
func shorten(s *spb.Status, room int) int {
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
	var wg sync.WaitGroup
	for range min(n, defaultParallel) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				f(int(i))
			}
		})
	}
	wg.Wait()
}

// checkSize refuses a blob that is over the configured limit.
func checkSize(o Options, d digest.Digest) error {
	if o.MaxBlobBytes > 0 && d.Size() > o.MaxBlobBytes {
		return fmt.Errorf("blob %s: %w: at most %d bytes are taken", d, blob.ErrTooLarge, o.MaxBlobBytes)
	}
	return nil
}
