package bench

import (
	"context"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/digest"
)

const (
	batchBlobs    = 100
	batchBlobSize = 4096
	smallSize     = 1024
	manyDigests   = 20000
	someDigests   = 1000
	// missingField is that of the digests in a FindMissingBlobsResponse.
	missingField = 2
	// maxWritten bounds what one measurement writes into the server, in bytes.
	maxWritten = 2 * gib
)

func findMissingScenarios(o Options) []scenario {
	of := func(name string, clients, digests int) scenario {
		return scenario{
			name: name, clients: clients, unit: "digests/s", perOp: float64(digests),
			// Calls are compared with calls: the share is 1 for a server
			// to which digests cost nothing.
			floor: floorUnary, floorPerOp: 1,
			prepare: func(ctx context.Context, c *client) (op, error) { return prepareFindMissing(ctx, c, digests) },
		}
	}
	return []scenario{
		of("1,000 a call, half missing", o.Concurrency[0], someDigests),
		of("20,000 a call, half missing", 1, manyDigests),
	}
}

// prepareFindMissing uploads every other of the blobs that a call asks for.
func prepareFindMissing(ctx context.Context, c *client, digests int) (op, error) {
	if err := c.needStorage(); err != nil {
		return nil, err
	}
	blobs := c.newSeries(64)
	req := &repb.FindMissingBlobsRequest{InstanceName: c.instance, DigestFunction: c.fn.Proto()}
	present := make([]content, 0, digests/2)
	for n := range uint64(digests) {
		if n%2 == 0 {
			b := blobs.content(n)
			present = append(present, b)
			req.BlobDigests = append(req.BlobDigests, b.digest.Proto())
		} else {
			d, _ := blobs.blob(n)
			req.BlobDigests = append(req.BlobDigests, d.Proto())
		}
	}
	if err := c.upload(ctx, present...); err != nil {
		return nil, err
	}
	raw, err := c.encoded(req)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, _ uint64) error {
		missing := fieldCounter{field: missingField}
		if err := c.invoke(ctx, findMissing, raw, &missing); err != nil {
			return fmt.Errorf("FindMissingBlobs: %w", err)
		}
		if want := digests - len(present); missing.n != want {
			return answerError("FindMissingBlobs: %d missing, want %d", missing.n, want)
		}
		return nil
	}, nil
}

func batchScenarios(o Options) []scenario {
	const size = float64(batchBlobs*batchBlobSize) / gib
	return []scenario{
		{
			name: "write 100 × 4 KiB", clients: o.Concurrency[0], unit: "blobs/s", perOp: batchBlobs,
			floor: floorWrite, floorPerOp: size, maxOps: maxWritten / (batchBlobs * batchBlobSize),
			prepare: prepareBatchWrite,
		},
		{
			name: "read 100 × 4 KiB", clients: o.Concurrency[0], unit: "blobs/s", perOp: batchBlobs,
			floor: floorRead, floorPerOp: size, prepare: prepareBatchRead,
		},
	}
}

// needBatch tells whether a batch of the subject batch fits in the server's limit.
func (c *client) needBatch() error {
	if err := c.needStorage(); err != nil {
		return err
	}
	if limit := c.maxBatch.Load(); limit < batchBlobs*(batchBlobSize+blobOverhead) {
		return fmt.Errorf("%w: the server takes batches of %d bytes only", errSkip, limit)
	}
	return nil
}

func prepareBatchWrite(ctx context.Context, c *client) (op, error) {
	if err := c.needBatch(); err != nil {
		return nil, err
	}
	blobs := c.newSeries(batchBlobSize)
	first := make([]content, batchBlobs)
	for i := range first {
		first[i] = blobs.content(uint64(i)) //nolint:gosec // not negative
	}
	if err := c.uploadBatch(ctx, first); err != nil {
		return nil, err
	}
	return func(ctx context.Context, n uint64) error {
		var got batchStatuses
		if err := c.invoke(ctx, batchUpdate, c.batchMessage(blobs, n*batchBlobs, batchBlobs), &got); err != nil {
			return fmt.Errorf("BatchUpdateBlobs: %w", err)
		}
		if got.n != batchBlobs {
			return answerError("BatchUpdateBlobs: %d responses for %d blobs", got.n, batchBlobs)
		}
		return nil
	}, c.needBatch() // the first call may have shown that there are none
}

// prepareBatchRead uploads ten batches, which the ops read in turn.
func prepareBatchRead(ctx context.Context, c *client) (op, error) {
	if err := c.needBatch(); err != nil {
		return nil, err
	}
	const batches = 10
	blobs := c.newSeries(batchBlobSize)
	var reqs [batches]rawMessage
	for i := range reqs {
		req := &repb.BatchReadBlobsRequest{InstanceName: c.instance, DigestFunction: c.fn.Proto()}
		batch := make([]content, batchBlobs)
		for j := range batch {
			batch[j] = blobs.content(uint64(i*batchBlobs + j))
			req.Digests = append(req.Digests, batch[j].digest.Proto())
		}
		if err := c.upload(ctx, batch...); err != nil {
			return nil, err
		}
		var err error
		if reqs[i], err = c.encoded(req); err != nil {
			return nil, err
		}
	}
	read := func(ctx context.Context, n uint64) error { return c.readBatch(ctx, reqs[n%batches]) }
	err := read(ctx, 0)
	if status.Code(err) == codes.Unimplemented {
		return nil, fmt.Errorf("%w: the server has no BatchReadBlobs", errSkip)
	}
	return read, err
}

func (c *client) readBatch(ctx context.Context, req rawMessage) error {
	var got batchCounter
	if err := c.invoke(ctx, batchRead, req, &got); err != nil {
		return fmt.Errorf("BatchReadBlobs: %w", err)
	}
	if got.blobs != batchBlobs || got.bytes != batchBlobs*batchBlobSize {
		return answerError("BatchReadBlobs: %d blobs with %d bytes, want %d with %d", got.blobs, got.bytes, batchBlobs, batchBlobs*batchBlobSize)
	}
	return nil
}

func streamScenarios(o Options) []scenario {
	size := float64(o.StreamBytes) / gib
	name := fmt.Sprintf("%.4g MiB", float64(o.StreamBytes)/mib)
	return []scenario{
		{
			name: "read " + name, clients: 1, unit: "GiB/s", perOp: size,
			floor: floorRead, floorPerOp: size, prepare: prepareRead(o.StreamBytes),
		},
		{
			name: "write " + name, clients: 1, unit: "GiB/s", perOp: size,
			floor: floorWrite, floorPerOp: size, maxOps: uint64(maxWritten / o.StreamBytes), prepare: prepareWrite(o.StreamBytes),
		},
		{
			name: "read 1 KiB", clients: o.Concurrency[0], unit: "blobs/s", perOp: 1,
			floor: floorUnary, floorPerOp: 1, prepare: prepareRead(smallSize),
		},
		{
			name: "write 1 KiB", clients: o.Concurrency[0], unit: "blobs/s", perOp: 1,
			floor: floorUnary, floorPerOp: 1, maxOps: maxWritten / smallSize, prepare: prepareWrite(smallSize),
		},
	}
}

// prepareRead uploads a few blobs, which the ops read in turn.
func prepareRead(size int) func(context.Context, *client) (op, error) {
	return func(ctx context.Context, c *client) (op, error) {
		if err := c.needStorage(); err != nil {
			return nil, err
		}
		blobs := c.newSeries(size)
		var ds [4]digest.Digest
		for i := range ds {
			d, tail := blobs.blob(uint64(i))
			if err := c.writeBytes(ctx, d, blobs.shared, tail); err != nil {
				return nil, err
			}
			ds[i] = d
		}
		return func(ctx context.Context, n uint64) error { return c.readBytes(ctx, ds[n%uint64(len(ds))]) }, nil
	}
}

func prepareWrite(size int) func(context.Context, *client) (op, error) {
	return func(_ context.Context, c *client) (op, error) {
		if err := c.needStorage(); err != nil {
			return nil, err
		}
		blobs := c.newSeries(size)
		return func(ctx context.Context, n uint64) error {
			d, tail := blobs.blob(n)
			return c.writeBytes(ctx, d, blobs.shared, tail)
		}, nil
	}
}
