package creds

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/wire"
)

// MaxForBytes bounds the name of whom a call is for: the longest name of an identity,
// with its subject, is shorter.
const MaxForBytes = 512

// onBehalf is the identity with the one that it acts for, where its policy lets it and
// the call says so. From the calls of all others the header is taken, so that nobody
// behind them believes it. The error is a status.
func onBehalf(ctx context.Context, id *Identity) (context.Context, *Identity, error) {
	names := metadata.ValueFromIncomingContext(ctx, wire.ActsForHeader)
	if len(names) == 0 {
		return ctx, id, nil
	}
	md, _ := metadata.FromIncomingContext(ctx) // a copy
	md.Delete(wire.ActsForHeader)
	ctx = metadata.NewIncomingContext(ctx, md)
	if !id.actsFor {
		return ctx, id, nil
	}
	if name := names[0]; len(names) > 1 || name == "" || len(name) > MaxForBytes || !printable(name) {
		return nil, nil, status.Errorf(codes.Unauthenticated, "%s acts for others, and the header %s names nobody: want one name of %d bytes at most that can be printed", id.Name, wire.ActsForHeader, MaxForBytes)
	}
	both := *id
	both.For = names[0]
	return ctx, &both, nil
}
