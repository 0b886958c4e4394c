package client_test

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	elanstatus "github.com/mettle-build/mettle/elan/status"
)

// later is a refusal that says when to come again: of a caller over its rate, or of a
// server that is short of memory.
func later(t testing.TB, code codes.Code) *gstatus.Status {
	t.Helper()
	s, err := gstatus.New(code, "not so fast").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(3 * time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// wantLater wants an error that has a call tried again, and that nobody takes for a
// store that is full.
func wantLater(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, blob.ErrUnavailable) || errors.Is(err, blob.ErrFull) || blob.RetryAfter(err) != 3*time.Second {
		t.Errorf("%s: %v, want ErrUnavailable for 3 s", what, err)
	}
	if got := elanstatus.Proto(err); got.GetCode() != int32(codes.Unavailable) || !strings.Contains(got.GetMessage(), "not so fast") {
		t.Errorf("%s: to clients it is %v, want UNAVAILABLE with the reason", what, got)
	}
}

// TestClient_told_to_wait: each call of a server that is there, and wants to be left
// alone for a while.
func TestClient_told_to_wait(t *testing.T) {
	for _, code := range []codes.Code{codes.ResourceExhausted, codes.Unavailable} {
		t.Run(code.String(), func(t *testing.T) {
			refuse := later(t, code).Err()
			var calls atomic.Int32
			conn := start(t, func(testing.TB, *grpc.Server) {}, grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
				calls.Add(1)
				return refuse
			}))
			c := newClient(t, client.Options{Conn: conn})
			data := []byte("some bytes")
			d := digest.Of(digest.SHA256, data)
			key := blob.EntryKey{Action: d}
			_, err := c.FindMissing(t.Context(), []digest.Digest{d})
			wantLater(t, "FindMissing", err)
			_, err = blob.ReadAll(t.Context(), c, d, d.Size())
			wantLater(t, "read", err)
			wantLater(t, "write", blob.WriteBytes(t.Context(), c, d, data))
			_, err = c.Get(t.Context(), key)
			wantLater(t, "Get", err)
			wantLater(t, "Put", c.Put(t.Context(), key, &repb.ActionResult{}))
			wantLater(t, "ReadTree", c.ReadTree(t.Context(), d, func([]byte) error { return nil }))
			calls.Store(0)
			wantLater(t, "WriteBatch", c.WriteBatch(t.Context(), []blob.Bytes{{Digest: d, Data: data}}))
			wantLater(t, "ReadBatch", c.ReadBatch(t.Context(), []digest.Digest{d}, func(int, []byte, error) {}))
			if n := calls.Load(); n != 2 {
				t.Errorf("%d calls for two batches: who is told to wait asks for nothing else", n)
			}
			_, _, err = c.LogStreams().Create(t.Context(), "")
			wantLater(t, "CreateLogStream", err)
		})
	}
}
