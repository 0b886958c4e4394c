package relay

import (
	"context"
	"errors"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/wire"
)

// What is special about log streams: one server of the storage has them, and another
// one that is asked says so; and who reads one waits for what comes, for as long as
// it takes, and so for longer than this server can when it shuts down.

// elsewhere reports whether the call is to be made again at once, because a server
// has answered that another one may have the log stream.
func (a *attempts) elsewhere(ctx context.Context, err error, trailer metadata.MD) bool {
	if status.Code(err) != codes.NotFound || ctx.Err() != nil || !slices.Contains(trailer.Get(wire.LogStreamTrailer), wire.LogStreamElsewhere) {
		return false
	}
	a.asked++
	return a.asked < wire.LogStreamAttempts
}

// The requests of both methods have a resource_name.
const (
	readMethod  = "/google.bytestream.ByteStream/Read"
	writeMethod = "/google.bytestream.ByteStream/Write"
	readName    = 1
	writeName   = 1
)

// isLogWrite reports whether an upload that begins with msg is of a log stream.
func isLogWrite(m *method, msg *wire.Raw) bool {
	if m.full != writeMethod {
		return false
	}
	name, ok := msg.Text(writeName)
	return ok && strings.Contains(name, "logstreams/")
}

// errDraining is the cause of a download's end by Shutdown.
var errDraining = errors.New("the server shuts down")

// Shutdown ends the downloads of log streams, and those that begin from now on, with
// UNAVAILABLE. It does not wait for them, and may be called twice.
func (r *Relay) Shutdown() { r.drain.Do(func() { close(r.draining) }) }

// until is ctx for the download that req asks for: where that is of a log stream it
// ends with Shutdown. The caller calls end.
func (r *Relay) until(ctx context.Context, req *wire.Raw, m *method) (_ context.Context, end func()) {
	if m.full != readMethod {
		return ctx, func() {}
	}
	if name, ok := req.Text(readName); !ok || !strings.Contains(name, "logstreams/") {
		return ctx, func() {}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-r.draining:
			cancel(errDraining)
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		cancel(nil)
		<-ended
	}
}

// drained is the status of a download that Shutdown has ended, or err.
func drained(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), errDraining) {
		return status.Error(codes.Unavailable, errDraining.Error())
	}
	return err
}
