package api

import (
	"errors"
	"strings"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	elanstatus "github.com/mettle-build/mettle/elan/status"
	"github.com/mettle-build/mettle/mettle/command"
	"github.com/mettle-build/mettle/mettle/operation"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
)

// The classes of errors of this package.
var (
	errInvalid   = errors.New("invalid request")
	errPublish   = errors.New("the action was not queued")
	errNotListed = errors.New("the server listens where others than its operator may reach it, and so it lists operations to nobody, unless one starts it with --admin")
	errWithdraw  = errors.New("the operation was not cancelled everywhere")
	errDraining  = errors.New("the server is shutting down: call WaitExecution, or try again")
)

// code is the status code of the errors that elan knows nothing of. The order
// counts: what failed to be published may be a full queue.
func code(err error) (codes.Code, bool) {
	for _, row := range [...]struct {
		class error
		code  codes.Code
	}{
		{errInvalid, codes.InvalidArgument},
		{command.ErrInvalid, codes.InvalidArgument},
		// The spec: "no worker being available". With no MISSING violations
		// in it, clients do not try again.
		{platform.ErrUnsupported, codes.FailedPrecondition},
		{operation.ErrBadName, codes.NotFound},
		{operation.ErrAbandoned, codes.Unavailable},
		{operation.ErrWithdrawn, codes.Unavailable},
		{operation.ErrCancelled, codes.Canceled},
		{errNotListed, codes.PermissionDenied},
		{queue.ErrFull, codes.ResourceExhausted},
		{errPublish, codes.Unavailable},
		{errWithdraw, codes.Unavailable},
		{errDraining, codes.Unavailable},
	} {
		if errors.Is(err, row.class) {
			return row.code, true
		}
	}
	return codes.Unknown, false
}

// toStatus is err as an error with a gRPC status.
func toStatus(err error) error {
	if c, ok := code(err); ok {
		return status.Error(c, message(err))
	}
	return elanstatus.FromRead(err)
}

// maxMessageBytes bounds a status message: grpc-java, and so Bazel, takes 8 KiB
// of trailers in all.
const maxMessageBytes = 2 << 10

// message is what err says, in UTF-8 and of a length that trailers can have.
func message(err error) string {
	s := err.Error()
	if len(s) > maxMessageBytes {
		s = s[:maxMessageBytes] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}

// statusProto is toStatus, as a message.
func statusProto(err error) *spb.Status {
	return status.Convert(toStatus(err)).Proto()
}

// transient reports whether what failed may succeed when it is tried again as
// it is. Such an error never ends an operation, only the stream.
func transient(err error) bool {
	switch status.Code(toStatus(err)) {
	case codes.Unavailable, codes.ResourceExhausted, codes.Internal, codes.Canceled, codes.DeadlineExceeded:
		return true
	default:
		return false
	}
}
