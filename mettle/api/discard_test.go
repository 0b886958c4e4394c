package api_test

import (
	"context"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	"google.golang.org/grpc"
)

// discard is a server's end of a stream whose client takes everything.
type discard struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // as a stream has it
}

func (d discard) Context() context.Context            { return d.ctx }
func (d discard) Send(*longrunningpb.Operation) error { return nil }
