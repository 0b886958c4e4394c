package client

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// fromStatus turns the error of a call into one of blob's classes, or context's,
// where its status has one. It is the inverse of elan/status as far as that goes:
// INVALID_ARGUMENT, for one, stands for several classes and comes back as it is.
func fromStatus(err error) error {
	s, ok := status.FromError(err)
	if !ok {
		return err
	}
	if busy := askedToWait(s); busy != nil {
		return busy
	}
	class := error(nil)
	switch s.Code() {
	case codes.OK:
		return nil
	case codes.NotFound:
		class = blob.ErrNotFound
	case codes.ResourceExhausted:
		class = blob.ErrFull
	case codes.Unavailable:
		class = blob.ErrUnavailable
	case codes.Canceled:
		class = context.Canceled
	case codes.DeadlineExceeded:
		class = context.DeadlineExceeded
	case codes.FailedPrecondition:
		if missing := missingBlobs(s); missing != nil {
			return fmt.Errorf("server: %w", missing)
		}
	}
	if class == nil {
		return fmt.Errorf("server: %w", err)
	}
	return fmt.Errorf("%w (server: %s: %s)", class, s.Code(), s.Message())
}

// askedToWait is what s comes to where it says when to come again: a limit on the
// caller's calls, or the server's memory. RESOURCE_EXHAUSTED without that is a store
// that is full, or a message that is too large. nil where it says nothing of the kind.
func askedToWait(s *status.Status) error {
	if s.Code() != codes.ResourceExhausted && s.Code() != codes.Unavailable {
		return nil
	}
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			return &blob.BusyError{Reason: fmt.Sprintf("%s: %s", s.Code(), s.Message()), After: info.GetRetryDelay().AsDuration()}
		}
	}
	return nil
}

// missingBlobs reads the MISSING violations of s; nil if there are none.
func missingBlobs(s *status.Status) error {
	var ds []digest.Digest
	for _, detail := range s.Details() {
		failure, ok := detail.(*errdetails.PreconditionFailure)
		if !ok {
			continue
		}
		for _, v := range failure.Violations {
			name, ok := strings.CutPrefix(v.Subject, "blobs/")
			if !ok || v.Type != "MISSING" {
				continue
			}
			if d, err := digest.Parse(name); err == nil {
				ds = append(ds, d)
			}
		}
	}
	if len(ds) == 0 {
		return nil
	}
	return &blob.MissingError{Digests: ds}
}
