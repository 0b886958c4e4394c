package client

import (
	"context"
	"fmt"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// maxBatchBytes is how much goes into one message, with all that is around
	// the blobs: below the 4 MiB that gRPC takes by default.
	maxBatchBytes = 4<<20 - 64<<10
	// besideBlob is more than what stands in a message beside a blob's bytes, with
	// the longest of hashes.
	besideBlob = 256
	// maxBatchCalls is how many calls of one batch are under way at a time.
	maxBatchCalls = 4
)

var (
	_ blob.BatchReader = (*Client)(nil)
	_ blob.BatchWriter = (*Client)(nil)
)

// batches is blobs, by their numbers, as they are sent together.
type batches struct {
	calls [][]int
	alone []int // too large for any batch
}

// split divides ds into batches of one digest function within the server's limit.
func split(ds []digest.Digest, limit int64) (b batches) {
	type open struct {
		blobs, message int64
		at             int // in calls
	}
	filling := map[digest.Function]*open{}
	for i, d := range ds {
		if limit > 0 && d.Size() > limit || d.Size() > maxBatchBytes-besideBlob {
			b.alone = append(b.alone, i)
			continue
		}
		o := filling[d.Function()]
		if o == nil || limit > 0 && o.blobs+d.Size() > limit || o.message+d.Size()+besideBlob > maxBatchBytes {
			o = &open{at: len(b.calls)}
			filling[d.Function()] = o
			b.calls = append(b.calls, nil)
		}
		o.blobs += d.Size()
		o.message += d.Size() + besideBlob
		b.calls[o.at] = append(b.calls[o.at], i)
	}
	return b
}

// ReadBatch implements blob.BatchReader, by BatchReadBlobs, and by ByteStream.Read
// for what is too large, or where the server has no batches.
func (c *Client) ReadBatch(ctx context.Context, ds []digest.Digest, take func(i int, data []byte, err error)) error {
	for _, d := range ds {
		if err := checkDigest(d); err != nil {
			return fmt.Errorf("read blobs: %w", err)
		}
	}
	caps, err := c.batchCaps(ctx)
	if err != nil {
		return fmt.Errorf("read %d blobs: %w", len(ds), err)
	}
	b := split(ds, caps.batchBytes)
	var group errgroup.Group // one that fails does not keep the others from their blobs
	group.SetLimit(maxBatchCalls)
	for _, call := range b.calls {
		group.Go(func() error { return c.readBatch(ctx, ds, call, caps, take) })
	}
	for _, i := range b.alone {
		group.Go(func() error { c.readAlone(ctx, ds, i, take); return nil })
	}
	return group.Wait() //nolint:wrapcheck // it says what was read
}

func (c *Client) readAlone(ctx context.Context, ds []digest.Digest, i int, take func(i int, data []byte, err error)) {
	data, err := blob.ReadAll(ctx, c, ds[i], ds[i].Size())
	take(i, data, err)
}

// readBatch reads those of ds that call numbers, by one call. The message is read
// by generated code: that gives each blob memory of its own, as take needs it.
func (c *Client) readBatch(ctx context.Context, ds []digest.Digest, call []int, caps *caps, take func(i int, data []byte, err error)) error {
	req := &repb.BatchReadBlobsRequest{InstanceName: c.o.Instance, DigestFunction: ds[call[0]].Function().Proto()}
	wanted := make(map[digest.Digest]int, len(call)) // by digest, until they are here
	for _, i := range call {
		d := ds[i]
		if d.IsEmpty() {
			take(i, nil, nil)
			continue
		}
		wanted[d] = i
		req.Digests = append(req.Digests, d.Proto())
		if caps.zstd && c.codec != nil && d.Size() >= c.o.CompressFrom && req.AcceptableCompressors == nil {
			req.AcceptableCompressors = []repb.Compressor_Value{repb.Compressor_ZSTD}
		}
	}
	if len(wanted) == 0 {
		return nil
	}
	resp := &repb.BatchReadBlobsResponse{}
	err := c.o.Conn.Invoke(ctx, repb.ContentAddressableStorage_BatchReadBlobs_FullMethodName, req, resp, c.wire)
	if refusesBatch(err) {
		for _, i := range wanted {
			c.readAlone(ctx, ds, i, take)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("read %d blobs: %w", len(call), fromStatus(err))
	}
	for _, r := range resp.Responses {
		d, err := digest.FromProto(ds[call[0]].Function(), r.Digest)
		if err != nil {
			return fmt.Errorf("read %d blobs: the server's answer: %w", len(call), err)
		}
		i, ok := wanted[d]
		if !ok {
			continue // twice, or not asked for
		}
		delete(wanted, d)
		data, err := c.batched(d, r)
		take(i, data, err)
	}
	for d := range wanted {
		return fmt.Errorf("read blob %s: the server's answer says nothing of it, nor of %d others", d, len(wanted)-1)
	}
	return nil
}

// batched is the bytes of one blob of a batch.
func (c *Client) batched(d digest.Digest, r *repb.BatchReadBlobsResponse_Response) ([]byte, error) {
	if err := status.FromProto(r.Status).Err(); err != nil {
		return nil, fmt.Errorf("read blob %s: %w", d, fromStatus(err))
	}
	data := r.Data
	switch {
	case r.Compressor == repb.Compressor_ZSTD && c.codec != nil:
		var err error
		if data, err = c.codec.Decode(r.Data, d.Size()); err != nil {
			return nil, fmt.Errorf("read blob %s: %w", d, err)
		}
	case r.Compressor != repb.Compressor_IDENTITY:
		return nil, fmt.Errorf("read blob %s: %w: the server sends %s, which was not asked for", d, blob.ErrCorrupt, r.Compressor)
	}
	if int64(len(data)) != d.Size() {
		return nil, fmt.Errorf("read blob %s: %w: the server sends %d bytes", d, blob.ErrCorrupt, len(data))
	}
	return data, nil
}

// refusesBatch reports whether err is of a server that has no batches, or finds
// this one too large: the blobs are to be had one by one all the same.
func refusesBatch(err error) bool {
	switch s := status.Convert(err); s.Code() {
	case codes.ResourceExhausted:
		return askedToWait(s) == nil
	case codes.Unimplemented, codes.InvalidArgument:
		return true
	}
	return false
}

// WriteBatch implements blob.BatchWriter, by BatchUpdateBlobs, and by
// ByteStream.Write as ReadBatch does.
func (c *Client) WriteBatch(ctx context.Context, bs []blob.Bytes) error {
	ds := make([]digest.Digest, len(bs))
	for i, b := range bs {
		if err := checkDigest(b.Digest); err != nil {
			return fmt.Errorf("write blobs: %w", err)
		}
		if ds[i] = b.Digest; int64(len(b.Data)) != b.Digest.Size() {
			return fmt.Errorf("write blob %s: there are %d bytes", b.Digest, len(b.Data))
		}
	}
	caps, err := c.batchCaps(ctx)
	if err != nil {
		return fmt.Errorf("write %d blobs: %w", len(bs), err)
	}
	parts := split(ds, caps.batchBytes)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(maxBatchCalls)
	for _, call := range parts.calls {
		group.Go(func() error { return c.writeBatch(ctx, bs, call, caps) })
	}
	for _, i := range parts.alone {
		group.Go(func() error { return blob.WriteBytes(ctx, c, bs[i].Digest, bs[i].Data) })
	}
	return group.Wait() //nolint:wrapcheck // it says what was written
}

// writeBatch writes those of bs that call numbers, by one call.
func (c *Client) writeBatch(ctx context.Context, bs []blob.Bytes, call []int, caps *caps) error {
	fn := bs[call[0]].Digest.Function()
	req := &repb.BatchUpdateBlobsRequest{InstanceName: c.o.Instance, DigestFunction: fn.Proto()}
	unsure := make(map[digest.Digest]struct{}, len(call)) // whether they are there
	for _, i := range call {
		b := bs[i]
		unsure[b.Digest] = struct{}{}
		r := &repb.BatchUpdateBlobsRequest_Request{Digest: b.Digest.Proto(), Data: b.Data}
		if caps.updateZstd && c.codec != nil && b.Digest.Size() >= c.o.CompressFrom {
			if z := c.codec.Append(nil, b.Data); len(z) < len(b.Data) {
				r.Data, r.Compressor = z, repb.Compressor_ZSTD
			}
		}
		req.Requests = append(req.Requests, r)
	}
	resp := &repb.BatchUpdateBlobsResponse{}
	err := c.o.Conn.Invoke(ctx, repb.ContentAddressableStorage_BatchUpdateBlobs_FullMethodName, req, resp, c.wire)
	if refusesBatch(err) {
		for _, i := range call {
			if err := blob.WriteBytes(ctx, c, bs[i].Digest, bs[i].Data); err != nil {
				return err //nolint:wrapcheck // it says what was written
			}
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("write %d blobs: %w", len(call), fromStatus(err))
	}
	for _, r := range resp.Responses {
		d, err := digest.FromProto(fn, r.Digest)
		if err != nil {
			return fmt.Errorf("write %d blobs: the server's answer: %w", len(call), err)
		}
		if err := status.FromProto(r.Status).Err(); err != nil {
			return fmt.Errorf("write blob %s: %w", d, fromStatus(err))
		}
		delete(unsure, d)
	}
	for d := range unsure {
		return fmt.Errorf("write blob %s: the server's answer says nothing of it, nor of %d others", d, len(unsure)-1)
	}
	return nil
}

// caps is what the server says of itself, as far as it matters here.
type caps struct {
	zstd, updateZstd bool
	batchBytes       int64 // of the blobs of a batch; 0: no limit but the message's
}

// ask is what the server says. It is asked until it has answered once.
func (c *Client) ask(ctx context.Context) (*caps, error) {
	if known := c.caps.Load(); known != nil {
		return known, nil
	}
	resp, err := c.capabilities.GetCapabilities(ctx, &repb.GetCapabilitiesRequest{InstanceName: c.o.Instance})
	if err != nil {
		return nil, err //nolint:wrapcheck // the callers do
	}
	cache := resp.GetCacheCapabilities()
	known := &caps{
		zstd:       slices.Contains(cache.GetSupportedCompressors(), repb.Compressor_ZSTD),
		updateZstd: slices.Contains(cache.GetSupportedBatchUpdateCompressors(), repb.Compressor_ZSTD),
		batchBytes: max(cache.GetMaxBatchTotalSizeBytes(), 0),
	}
	c.caps.Store(known)
	return known, nil
}

// batchCaps is ask for batches. A server that does not tell is one without a limit
// of its own; one that is away is waited for by the caller.
func (c *Client) batchCaps(ctx context.Context) (*caps, error) {
	known, err := c.ask(ctx)
	switch status.Code(err) {
	case codes.OK:
		return known, nil
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		return nil, fromStatus(err)
	}
	if busy := askedToWait(status.Convert(err)); busy != nil {
		return nil, busy
	}
	return &caps{}, nil
}
