package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	bspb "google.golang.org/genproto/googleapis/bytestream"

	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// floodDigests make a FindMissingBlobsRequest of nearly 4 MiB.
	floodDigests = 52_000
	// floodChunk is how much Bazel sends in one message.
	floodChunk = 16 << 10
	// floodBlob is how large the blobs are that a flood writes, and floodBlobs how many
	// of them there are: a flood that filled the disk would show nothing new.
	floodBlob  = 256 << 10
	floodBlobs = 4096
	// floodRead is how large the blob is that a flood reads.
	floodRead = 64 * mib
)

// kinds of floods. All calls of one go over one connection but of those of connections.
func loadScenarios(o Options) []scenario {
	of := func(name string, calls int, begin func(context.Context, Options, *client) (op, func(), error)) scenario {
		return scenario{name: fmt.Sprintf("%d %s", calls, name), clients: 1, unit: "calls/s", perOp: 3, flood: &flood{calls: calls, begin: begin}}
	}
	own := func(name string, prepare func(context.Context, *client) (op, error)) scenario {
		return of(name, o.LoadCalls, ownConnection(prepare))
	}
	executes := func(name string, prepare func(context.Context, *client) (op, error)) scenario {
		s := own(name, prepare)
		s.perOp, s.prepare = 4, prepareGoodExecute
		return s
	}
	all := []scenario{
		own("FindMissing of 4 MiB", floodFindMissing),
		own("BatchUpdate of 3.4 MiB", floodBatchUpdate),
		own("BatchRead not taken", holdBatchRead),
		own("Write in 16 KiB", floodWrite),
		own("Write halted", holdWrite),
		own("Read not taken", holdRead),
		own("GetTree not taken", holdTree),
		own("Write of zstd", floodZstd),
		own("Execute", prepareTrivial),
		executes("Execute that waits", holdExecute(o.LoadCalls)),
		executes("WaitExecution", holdWaitExecution(o.LoadCalls)),
		of("connections", o.LoadConnections, holdConnections),
		of("connections, idle", o.LoadConnections, holdIdle),
		of("connections without a word", o.LoadConnections, rawFlood(false, saysNothing)),
		of("connections that stop in TLS", o.LoadConnections, rawFlood(true, stopsInTLS)),
		of("connections that stop in the preface", o.LoadConnections, rawFlood(false, stopsInPreface)),
	}
	return slices.DeleteFunc(all, func(s scenario) bool { return !strings.Contains(s.name, o.LoadFloods) })
}

// ownConnection begins a flood over one connection.
func ownConnection(prepare func(context.Context, *client) (op, error)) func(context.Context, Options, *client) (op, func(), error) {
	return func(ctx context.Context, o Options, like *client) (op, func(), error) {
		c, err := dial(ctx, o, like.fn)
		if err != nil {
			return nil, nil, err
		}
		f, err := prepare(ctx, c)
		if err != nil {
			c.close()
			return nil, nil, err
		}
		return f, c.close, nil
	}
}

// missing asks for one blob that is not there.
func (c *client) missing(ctx context.Context, d digest.Digest) error {
	resp, err := c.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{InstanceName: c.instance, DigestFunction: c.fn.Proto(), BlobDigests: []*repb.Digest{d.Proto()}})
	if err == nil && len(resp.GetMissingBlobDigests()) != 1 {
		err = answerError("FindMissingBlobs: a blob is there that nobody has written")
	}
	return err
}

func floodFindMissing(_ context.Context, c *client) (op, error) {
	req := &repb.FindMissingBlobsRequest{InstanceName: c.instance, DigestFunction: c.fn.Proto()}
	blobs := c.newSeries(smallSize)
	for n := range uint64(floodDigests) {
		d, _ := blobs.blob(n)
		req.BlobDigests = append(req.BlobDigests, d.Proto())
	}
	raw, err := c.encoded(req)
	return func(ctx context.Context, _ uint64) error {
		return c.invoke(ctx, findMissing, raw, &fieldCounter{field: missingField})
	}, err
}

func floodBatchUpdate(_ context.Context, c *client) (op, error) {
	size := c.maxBatch.Load() - blobOverhead
	if size <= tailSize {
		return nil, fmt.Errorf("%w: the server has no batches", errSkip)
	}
	b := c.newSeries(int(min(size, 34*mib/10))).content(0)
	raw, err := c.encoded(&repb.BatchUpdateBlobsRequest{
		InstanceName: c.instance, DigestFunction: c.fn.Proto(),
		Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: b.digest.Proto(), Data: b.data}},
	})
	return func(ctx context.Context, _ uint64) error {
		return c.invoke(ctx, batchUpdate, raw, &batchStatuses{})
	}, err
}

// held is an op that makes a call of one message, and takes nothing of the answer
// until its context ends.
func (c *client) held(method string, req any) op {
	return func(ctx context.Context, _ uint64) error {
		s, err := c.open(ctx, method)
		if err != nil {
			return err
		}
		if err := s.SendMsg(req); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if err := s.CloseSend(); err != nil {
			return err
		}
		<-ctx.Done()
		return nil
	}
}

func holdBatchRead(ctx context.Context, c *client) (op, error) {
	size := c.maxBatch.Load() - blobOverhead
	if size <= tailSize {
		return nil, fmt.Errorf("%w: the server has no batches", errSkip)
	}
	b := c.newSeries(int(min(size, 34*mib/10))).content(0)
	if err := c.upload(ctx, b); err != nil {
		return nil, err
	}
	raw, err := c.encoded(&repb.BatchReadBlobsRequest{InstanceName: c.instance, DigestFunction: c.fn.Proto(), Digests: []*repb.Digest{b.digest.Proto()}})
	return c.held(batchRead, raw), err
}

func holdRead(ctx context.Context, c *client) (op, error) {
	blobs := c.newSeries(floodRead)
	d, tail := blobs.blob(0)
	if err := c.writeBytes(ctx, d, blobs.shared, tail); err != nil {
		return nil, err
	}
	return c.held(streamRead, &bspb.ReadRequest{ResourceName: c.resource("blobs/" + d.String())}), nil
}

func holdTree(ctx context.Context, c *client) (op, error) {
	root, err := c.uploadTree(ctx)
	if err != nil {
		return nil, err
	}
	raw, err := c.encoded(&repb.GetTreeRequest{InstanceName: c.instance, RootDigest: root.Proto(), DigestFunction: c.fn.Proto()})
	return c.held(getTree, raw), err
}

func floodWrite(_ context.Context, c *client) (op, error) {
	blobs := c.newSeries(floodBlob)
	shared := slices.Collect(slices.Chunk(blobs.shared, floodChunk))
	return func(ctx context.Context, n uint64) error {
		d, tail := blobs.blob(n % floodBlobs)
		return c.writeBytes(ctx, d, append(slices.Clone(shared), tail)...)
	}, nil
}

// holdWrite begins uploads, and sends no more.
func holdWrite(_ context.Context, c *client) (op, error) {
	blobs := c.newSeries(floodBlob)
	return func(ctx context.Context, n uint64) error {
		s, err := c.open(ctx, streamWrite)
		if err != nil {
			return err
		}
		d, _ := blobs.blob(n)
		req := &bspb.WriteRequest{ResourceName: c.resource("uploads/" + newUUID() + "/blobs/" + d.String())}
		if err := s.SendMsg(writeMessage(req, blobs.shared[:floodChunk])); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		return s.RecvMsg(&bspb.WriteResponse{})
	}, nil
}

func floodZstd(_ context.Context, c *client) (op, error) {
	blobs, err := c.newZstdSeries(floodBlob)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, n uint64) error {
		d, tail := blobs.blob(n % floodBlobs)
		return c.writeZstd(ctx, d, blobs.parts(tail))
	}, nil
}
