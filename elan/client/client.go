// Package client is a blob.Store and an ActionCache over gRPC, to any server of
// the REAPI: a store among others, that passes the same suite as they do.
//
// Many small blobs travel by one call, where they are asked for together (see
// blob.BatchReader), within what the server takes at once. Large blobs travel as zstd, where that is wanted and the server offers it. The
// client verifies nothing that it reads, as no store does, but for the length. It
// does not try again what failed: errors are of blob's classes, by which a
// caller knows whether to; a server that asks for a pause, by RetryInfo, is a
// blob.BusyError. The load generator, mettle one, and a server whose
// storage is another server use it.
package client

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/compress"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/wire"
)

const (
	// defaultChunkBytes is what every server takes as a message.
	defaultChunkBytes = 1 << 20
	// defaultMaxDigests keeps a FindMissingBlobs of the longest hashes below
	// the usual message limit of 4 MiB.
	defaultMaxDigests = 20_000
)

// Options are those of New.
type Options struct {
	// Conn is the connection, which the caller closes; see Dial.
	Conn grpc.ClientConnInterface
	// Instance is the instance name of the CAS calls. The results of actions
	// are in the instances that their keys name.
	Instance string
	// ChunkBytes is how much of a blob goes into one message; 0 means 1 MiB.
	ChunkBytes int
	// MaxDigests is how many blobs are looked up by one call; 0 means 20,000.
	MaxDigests int
	// CompressFrom, in bytes, is from which size on blobs travel compressed, to a
	// server whose capabilities offer zstd; 0 means that none do. It is worthwhile
	// where the network is slower than some 100 MiB/s. Each blob that is read so
	// takes a window's memory, mostly 1 MiB and at most 8, while it is open.
	CompressFrom int64
}

// Client is a connection's other end as a store. It is safe for concurrent use
// and needs no closing.
type Client struct {
	o       Options
	actions repb.ActionCacheClient
	streams bytestream.ByteStreamClient

	// wire makes the messages of calls those of elan/wire.
	wire grpc.CallOption

	codec        *compress.Codec // nil if nothing is compressed
	capabilities repb.CapabilitiesClient
	caps         atomic.Pointer[caps] // nil: it has not said
	noTrees      atomic.Bool          // it has no GetTree
}

var (
	_ blob.Store    = (*Client)(nil)
	_ action.Getter = (*Client)(nil)
	_ action.Putter = (*Client)(nil)
)

// New checks the options and returns a Client. It makes no call.
func New(o Options) (*Client, error) {
	if o.Conn == nil {
		return nil, errors.New("client: Options need a Conn")
	}
	if o.ChunkBytes < 0 || o.MaxDigests < 0 || o.CompressFrom < 0 {
		return nil, errors.New("client: ChunkBytes, MaxDigests and CompressFrom may not be negative")
	}
	if o.ChunkBytes == 0 {
		o.ChunkBytes = defaultChunkBytes
	}
	if o.MaxDigests == 0 {
		o.MaxDigests = defaultMaxDigests
	}
	c := &Client{
		o:            o,
		wire:         grpc.ForceCodecV2(wire.NewCodec(wire.NewPool())),
		actions:      repb.NewActionCacheClient(o.Conn),
		streams:      bytestream.NewByteStreamClient(o.Conn),
		capabilities: repb.NewCapabilitiesClient(o.Conn),
	}
	if o.CompressFrom > 0 {
		var err error
		if c.codec, err = compress.New(); err != nil {
			return nil, fmt.Errorf("client: %w", err)
		}
	}
	return c, nil
}

// FindMissing implements blob.Finder, by one call for each MaxDigests blobs and
// each digest function.
func (c *Client) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	asked := make(map[digest.Digest]bool, len(ds)) // whether it is missing
	byFunction := map[digest.Function][]wire.Digest{}
	for _, d := range ds {
		if err := checkDigest(d); err != nil {
			return nil, fmt.Errorf("find missing blobs: %w", err)
		}
		if _, ok := asked[d]; ok || d.IsEmpty() {
			continue
		}
		asked[d] = false
		byFunction[d.Function()] = append(byFunction[d.Function()], wire.Digest{Hash: d.Hash(), SizeBytes: d.Size()})
	}
	for fn, named := range byFunction {
		for len(named) > 0 {
			n := min(len(named), c.o.MaxDigests)
			if err := c.findMissing(ctx, fn, named[:n], asked); err != nil {
				return nil, err
			}
			named = named[n:]
		}
	}
	var missing []digest.Digest
	for _, d := range ds {
		if asked[d] {
			missing = append(missing, d)
			asked[d] = false // once is enough
		}
	}
	return missing, nil
}

// checkDigest refuses what can't be asked of another server: it knows instances,
// and no spaces.
func checkDigest(d digest.Digest) error {
	switch {
	case d.IsZero():
		return fmt.Errorf("%w: the zero digest names no blob", digest.ErrInvalid)
	case !d.Space().IsZero():
		return fmt.Errorf("blob %s: another server's blobs are in no space: %w", d, errors.ErrUnsupported)
	}
	return nil
}

// findMissing sets those of missing to true that the server says it has not.
func (c *Client) findMissing(ctx context.Context, fn digest.Function, named []wire.Digest, missing map[digest.Digest]bool) error {
	req, resp := wire.NewFindMissingRequest(c.o.Instance, fn.Proto(), named), &wire.FindMissingResponse{}
	err := c.o.Conn.Invoke(ctx, repb.ContentAddressableStorage_FindMissingBlobs_FullMethodName, req, resp, c.wire)
	if err != nil {
		return fmt.Errorf("find missing blobs: %w", fromStatus(err))
	}
	for _, m := range resp.Missing() {
		d, err := digest.New(fn, m.Hash, m.SizeBytes)
		if err != nil {
			return fmt.Errorf("find missing blobs: the server's answer: %w", err)
		}
		missing[d] = true
	}
	return nil
}

// Get implements action.Getter.
func (c *Client) Get(ctx context.Context, k blob.EntryKey) (*repb.ActionResult, error) {
	r, err := c.actions.GetActionResult(ctx, &repb.GetActionResultRequest{
		InstanceName: k.Instance, ActionDigest: k.Action.Proto(), DigestFunction: k.Action.Function().Proto(),
	})
	if err != nil {
		return nil, fmt.Errorf("result of action %s: %w", k.Action, fromStatus(err))
	}
	return r, nil
}

// Failures keeps what failed at another server, which serves it in the instances
// of action.FailedInstance, as Elan does. It is safe for concurrent use.
type Failures struct{ c *Client }

// Failures are those of all instances of c's server.
func (c *Client) Failures() Failures { return Failures{c} }

// Put keeps the response to an execution of k that failed, in place of an older
// one of the same action.
func (f Failures) Put(ctx context.Context, k blob.EntryKey, resp *repb.ExecuteResponse) error {
	r, err := action.FailedResult(resp)
	if err != nil {
		return fmt.Errorf("keep the failure of action %s: %w", k.Action, err)
	}
	return f.c.update(ctx, blob.EntryKey{Instance: action.FailedInstance(k.Instance), Action: k.Action}, r)
}

// Put implements action.Putter.
func (c *Client) Put(ctx context.Context, k blob.EntryKey, r *repb.ActionResult) error {
	if r.GetExitCode() != 0 {
		return fmt.Errorf("result of action %s: %w: exit code %d, want 0", k.Action, action.ErrNotCacheable, r.GetExitCode())
	}
	return c.update(ctx, k, r)
}

func (c *Client) update(ctx context.Context, k blob.EntryKey, r *repb.ActionResult) error {
	_, err := c.actions.UpdateActionResult(ctx, &repb.UpdateActionResultRequest{
		InstanceName: k.Instance, ActionDigest: k.Action.Proto(), ActionResult: r, DigestFunction: k.Action.Function().Proto(),
	})
	if err != nil {
		return fmt.Errorf("result of action %s: %w", k.Action, fromStatus(err))
	}
	return nil
}
