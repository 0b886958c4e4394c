package status_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
	"github.com/mettle-build/mettle/elan/status"
	"github.com/mettle-build/mettle/elan/tree"
)

func TestFrom_table(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want codes.Code
		read codes.Code // what FromRead gives where it differs
	}{
		{err: context.Canceled, want: codes.Canceled},
		{err: context.DeadlineExceeded, want: codes.DeadlineExceeded},
		{err: digest.ErrInvalid, want: codes.InvalidArgument},
		{err: resource.ErrInvalid, want: codes.InvalidArgument},
		{err: tree.ErrInvalid, want: codes.InvalidArgument},
		{err: action.ErrInvalid, want: codes.InvalidArgument},
		{err: action.ErrNotCacheable, want: codes.InvalidArgument},
		{err: action.ErrForbidden, want: codes.PermissionDenied},
		{err: blob.ErrMalformed, want: codes.InvalidArgument},
		{err: blob.ErrCorrupt, want: codes.InvalidArgument, read: codes.Internal},
		{err: blob.ErrTooLarge, want: codes.InvalidArgument},
		{err: blob.ErrFull, want: codes.ResourceExhausted},
		{err: blob.ErrUnavailable, want: codes.Unavailable},
		{err: blob.ErrNotFound, want: codes.NotFound},
		{err: &blob.MissingError{Digests: []digest.Digest{digest.Empty(digest.SHA256)}}, want: codes.FailedPrecondition},
		{err: errors.New("disk on fire"), want: codes.Internal},
		{err: gstatus.Error(codes.Aborted, "as it is"), want: codes.Aborted},
	} {
		t.Run(tc.err.Error(), func(t *testing.T) {
			if tc.read == codes.OK {
				tc.read = tc.want
			}
			for _, err := range []error{tc.err, fmt.Errorf("while testing: %w", tc.err)} {
				if got := gstatus.Code(status.From(err)); got != tc.want {
					t.Errorf("From(%v): %v, want %v", err, got, tc.want)
				}
				if got := gstatus.Code(status.FromRead(err)); got != tc.read {
					t.Errorf("FromRead(%v): %v, want %v", err, got, tc.read)
				}
				if got := codes.Code(status.Proto(err).Code); got != tc.want {
					t.Errorf("Proto(%v): %v, want %v", err, got, tc.want)
				}
				if got := gstatus.Convert(status.From(err)).Message(); !strings.Contains(got, gstatus.Convert(tc.err).Message()) {
					t.Errorf("From(%v): message %q, want what went wrong in it", err, got)
				}
			}
		})
	}
}

func TestFrom_nil(t *testing.T) {
	if err := status.From(nil); err != nil {
		t.Errorf("From(nil): %v, want nil", err)
	}
	if err := status.FromRead(nil); err != nil {
		t.Errorf("FromRead(nil): %v, want nil", err)
	}
	if s := status.Proto(nil); s == nil || s.Code != 0 {
		t.Errorf("Proto(nil): %v, want OK", s)
	}
}

func TestFrom_missing_blobs(t *testing.T) {
	missing := &blob.MissingError{}
	for i := range 1000 {
		missing.Digests = append(missing.Digests, digest.Of(digest.SHA256, fmt.Append(nil, i)))
	}
	missing.Digests[1] = digest.Of(digest.BLAKE3, []byte("x"))
	err := fmt.Errorf("update: %w", missing)

	inTrailers := gstatus.Convert(status.From(err))
	details := inTrailers.Details()
	if len(details) != 1 {
		t.Fatalf("details: %v, want one PreconditionFailure", details)
	}
	vs := details[0].(*errdetails.PreconditionFailure).Violations
	for i, want := range missing.Digests[:2] {
		if v := vs[i]; v.Type != "MISSING" || v.Subject != "blobs/"+want.String() {
			t.Errorf("violation %d: %v, want MISSING of blobs/%s", i, v, want)
		}
	}
	if !strings.HasPrefix(vs[1].Subject, "blobs/blake3/") {
		t.Errorf("subject %q, want the digest function in it", vs[1].Subject)
	}
	// In base64, beside the message itself, it must be less than Java's 8 KiB.
	if n := proto.Size(inTrailers.Proto()) * 4 / 3; n > 6<<10 {
		t.Errorf("the status takes %d bytes of trailers, want at most 6 KiB", n)
	}

	whole, err := status.Proto(err).Details[0].UnmarshalNew()
	if err != nil {
		t.Fatal(err)
	}
	if n := len(whole.(*errdetails.PreconditionFailure).Violations); n != len(missing.Digests) {
		t.Errorf("Proto names %d blobs, want all %d", n, len(missing.Digests))
	}
}

func TestFrom_bounds_messages(t *testing.T) {
	for _, text := range []string{strings.Repeat("é", 100_000), "a\xffb" + strings.Repeat("\xfe", 2000)} {
		s := status.Proto(errors.New(text))
		if _, err := proto.Marshal(s); err != nil {
			t.Errorf("a message of odd bytes: %v", err)
		}
		if len(s.Message) > 4<<10 {
			t.Errorf("message of %d bytes, want a short one", len(s.Message))
		}
	}
}
