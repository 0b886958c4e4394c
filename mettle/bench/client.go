package bench

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// dialTimeout bounds the first call.
	dialTimeout = 10 * time.Second
	// defaultMaxBatch is taken where a server sets no limit: gRPC's default
	// limit on messages.
	defaultMaxBatch = 4 * mib
	// blobOverhead is more than a message adds to a blob: its digest, tags
	// and lengths.
	blobOverhead = 192
	// maxReceive lets a server answer with batches of the size that it offers.
	maxReceive = 64 * mib
)

// client speaks to the server that is measured. It is safe for concurrent use.
type client struct {
	conn     *grpc.ClientConn
	raw      rawCodec
	cas      repb.ContentAddressableStorageClient
	ac       repb.ActionCacheClient
	exec     repb.ExecutionClient
	instance string
	fn       digest.Function
	platform *repb.Platform
	caps     *repb.ServerCapabilities
	// maxBatch is what a batch may hold, in bytes, with blobOverhead for each
	// of its blobs. 0: the server has no batches.
	maxBatch atomic.Int64
	// overheads are what the actions that ran took on their workers without the
	// command itself, as their metadata tell.
	overheads waits
}

// dial connects, and asks the server what it can do. The caller closes the
// client.
func dial(ctx context.Context, o Options, fn digest.Function) (*client, error) {
	target, opts, err := dialOptions(o)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(target, opts...)
	if err != nil {
		return nil, fmt.Errorf("remote %s: %w", o.Remote, err)
	}
	c := &client{
		conn: conn, raw: newRawCodec(), cas: repb.NewContentAddressableStorageClient(conn), ac: repb.NewActionCacheClient(conn),
		exec:     repb.NewExecutionClient(conn),
		instance: o.Instance, fn: fn, platform: platformOf(o.Platform),
	}
	if err := c.capabilities(ctx, o.Remote); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return c, nil
}

func (c *client) close() { _ = c.conn.Close() } // changes no figure

// dialOptions reads the remote's address.
func dialOptions(o Options) (string, []grpc.DialOption, error) {
	creds := insecure.NewCredentials()
	target := o.Remote
	switch scheme, rest, ok := strings.Cut(o.Remote, "://"); {
	case o.Remote == "":
		return "", nil, errors.New("no remote given, want such as grpc://localhost:7778")
	case ok && scheme == "grpc":
		target = rest
	case ok && scheme == "grpcs":
		target = rest
		creds = credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12})
	case ok && scheme != "unix" && scheme != "dns":
		return "", nil, fmt.Errorf("remote %q has scheme %q, want grpc, grpcs or unix", o.Remote, scheme)
	}
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReceive)),
		grpc.WithUserAgent("mettle-bench"),
	}
	if len(o.Headers) > 0 {
		md := metadata.New(o.Headers)
		opts = append(opts,
			grpc.WithUnaryInterceptor(func(ctx context.Context, m string, req, resp any, cc *grpc.ClientConn, inv grpc.UnaryInvoker, co ...grpc.CallOption) error {
				return inv(metadata.NewOutgoingContext(ctx, md), m, req, resp, cc, co...)
			}),
			grpc.WithStreamInterceptor(func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, st grpc.Streamer, co ...grpc.CallOption) (grpc.ClientStream, error) {
				return st(metadata.NewOutgoingContext(ctx, md), d, cc, m, co...)
			}))
	}
	return target, opts, nil
}

// platformOf is props as a message, sorted as the API demands; nil of none.
func platformOf(props map[string]string) *repb.Platform {
	if len(props) == 0 {
		return nil
	}
	p := &repb.Platform{}
	for k, v := range props {
		p.Properties = append(p.Properties, &repb.Platform_Property{Name: k, Value: v})
	}
	slices.SortFunc(p.Properties, func(a, b *repb.Platform_Property) int { return strings.Compare(a.GetName(), b.GetName()) })
	return p
}

// capabilities makes the first call, whose failure is explained.
func (c *client) capabilities(ctx context.Context, remote string) error {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	caps, err := repb.NewCapabilitiesClient(c.conn).GetCapabilities(ctx, &repb.GetCapabilitiesRequest{InstanceName: c.instance})
	switch status.Code(err) {
	case codes.OK:
	case codes.Unavailable, codes.DeadlineExceeded:
		return fmt.Errorf("no server answers at %s, is it running there? %w", remote, err)
	case codes.Unimplemented:
		return fmt.Errorf("the server at %s speaks gRPC, but not the Remote Execution API: %w", remote, err)
	default:
		return fmt.Errorf("capabilities of %s: %w", remote, err)
	}
	c.caps = caps
	fns := caps.GetCacheCapabilities().GetDigestFunctions()
	if len(fns) > 0 && !slices.Contains(fns, c.fn.Proto()) {
		return fmt.Errorf("the server at %s does not take digest function %v, but %v", remote, c.fn, fns)
	}
	limit := caps.GetCacheCapabilities().GetMaxBatchTotalSizeBytes()
	if limit <= 0 {
		limit = defaultMaxBatch
	}
	c.maxBatch.Store(min(limit, maxReceive))
	return nil
}

// needExecution tells whether the server executes.
func (c *client) needExecution() error {
	if !c.caps.GetExecutionCapabilities().GetExecEnabled() {
		return fmt.Errorf("%w: the server does not execute", errSkip)
	}
	return nil
}

// needStorage tells whether the server stores.
func (c *client) needStorage() error {
	if c.caps.GetCacheCapabilities() == nil {
		return fmt.Errorf("%w: the server does not store", errSkip)
	}
	return nil
}
