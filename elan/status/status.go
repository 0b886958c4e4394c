// Package status is the one table from the classes of errors of this project to
// gRPC statuses. The edges use it, elan/rpc and mettle/api, and nobody else: all
// other packages wrap the classes, and know no gRPC.
package status

import (
	"context"
	"errors"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
	"github.com/mettle-build/mettle/elan/tree"
)

const (
	// maxTrailerViolations bounds the violations in a status that travels in
	// the trailers of a call. grpc-java, and so Bazel, takes at most 8 KiB of
	// them; a violation is some 125 bytes in base64, and the message is there
	// twice. Clients upload what they find missing anyway, not only what is named.
	maxTrailerViolations = 32
	// maxMessage bounds a message in bytes, for the same reason.
	maxMessage = 1 << 10
	// maxViolations bounds those in a message: a megabyte of them.
	maxViolations = 10_000
)

// From is err as an error with a gRPC status, to be returned from a handler. Nil
// stays nil, and what has a status keeps it. A blob.MissingError becomes
// FAILED_PRECONDITION with a MISSING violation for each blob, up to what fits
// into trailers. Bytes that do not match their digest are INVALID_ARGUMENT:
// the client sent them. See FromRead for the other case.
func From(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.ErrorProto(toProto(err, maxTrailerViolations))
}

// FromRead is From for an error of reading the store's own blobs. Bytes that do
// not match their digest are the store's fault there, and INTERNAL, so that
// the client tries again, when the store may have noticed or a copy be found.
func FromRead(err error) error {
	if errors.Is(err, blob.ErrCorrupt) {
		if _, ok := status.FromError(err); !ok {
			return status.Error(codes.Internal, cut(err.Error()))
		}
	}
	return From(err)
}

// Proto is err as a message, for the fields that carry a status: each blob's
// in a batch, and ExecuteResponse's. It names more missing blobs than From does.
// Nil is OK.
func Proto(err error) *spb.Status {
	if err == nil {
		return &spb.Status{}
	}
	if s, ok := status.FromError(err); ok {
		return s.Proto()
	}
	return toProto(err, maxViolations)
}

// toProto names up to limit missing blobs.
func toProto(err error, limit int) *spb.Status {
	s := &spb.Status{Code: int32(code(err)), Message: cut(err.Error())}
	if missing, ok := errors.AsType[*blob.MissingError](err); ok {
		s.Details = violations(missing.Digests, limit)
	}
	return s
}

// code is the table. The order counts: a MissingError is an ErrNotFound too.
func code(err error) codes.Code {
	if _, ok := errors.AsType[*blob.MissingError](err); ok {
		return codes.FailedPrecondition
	}
	for _, row := range [...]struct {
		class error
		code  codes.Code
	}{
		{context.Canceled, codes.Canceled},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{digest.ErrInvalid, codes.InvalidArgument},
		{resource.ErrInvalid, codes.InvalidArgument},
		{tree.ErrInvalid, codes.InvalidArgument},
		{action.ErrInvalid, codes.InvalidArgument},
		{action.ErrNotCacheable, codes.InvalidArgument},
		{action.ErrForbidden, codes.PermissionDenied},
		{blob.ErrMalformed, codes.InvalidArgument},
		{blob.ErrCorrupt, codes.InvalidArgument},
		// CacheCapabilities.max_cas_blob_size_bytes asks for this code.
		{blob.ErrTooLarge, codes.InvalidArgument},
		{blob.ErrFull, codes.ResourceExhausted},
		{blob.ErrUnavailable, codes.Unavailable},
		{blob.ErrNotFound, codes.NotFound},
	} {
		if errors.Is(err, row.class) {
			return row.code
		}
	}
	return codes.Internal
}

// violations is what Execution.Execute in remote_execution.proto describes.
func violations(ds []digest.Digest, limit int) []*anypb.Any {
	failure := &errdetails.PreconditionFailure{}
	for _, d := range ds[:min(len(ds), limit)] {
		failure.Violations = append(failure.Violations, &errdetails.PreconditionFailure_Violation{
			Type:    "MISSING",
			Subject: "blobs/" + d.Plain().String(),
		})
	}
	detail, err := anypb.New(failure)
	if err != nil {
		// Only a message that is not UTF-8 fails to marshal, and these are hexadecimal.
		return nil
	}
	return []*anypb.Any{detail}
}

// cut bounds a message, and makes it UTF-8, without which the status could not
// be marshalled.
func cut(s string) string {
	if len(s) > maxMessage {
		end := maxMessage
		for end > 0 && !utf8.RuneStart(s[end]) {
			end--
		}
		s = s[:end] + "..."
	}
	if !utf8.ValidString(s) {
		return string([]rune(s))
	}
	return s
}
