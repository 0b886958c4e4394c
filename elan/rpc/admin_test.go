package rpc_test

import (
	"context"
	"iter"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/inventory"
	"github.com/mettle-build/mettle/elan/rpc"
	storepb "github.com/mettle-build/mettle/proto/store"
)

// waiting is an Inventory whose listings wait for their calls to be cancelled,
// after telling that they have begun.
type waiting struct {
	inventory.Inventory
	begun chan struct{}
}

func (w waiting) Blobs(ctx context.Context, _ inventory.Filter) iter.Seq2[blob.Info, error] {
	return func(func(blob.Info, error) bool) {
		w.begun <- struct{}{}
		<-ctx.Done()
	}
}

func startAdmin(t *testing.T, o rpc.AdminOptions) storepb.StoreClient {
	t.Helper()
	g := grpc.NewServer()
	rpc.RegisterAdmin(g, o)
	l := bufconn.Listen(1 << 20)
	done := make(chan error)
	go func() { done <- g.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:bufconn",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		g.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return storepb.NewStoreClient(conn)
}

func TestAdmin_bad_requests(t *testing.T) {
	c := startAdmin(t, rpc.AdminOptions{Anywhere: true}) // never asked
	many := make([]string, 10_001)
	for i := range many {
		many[i] = of([]byte("x")).String()
	}
	list := func(req *storepb.ListRequest) error {
		stream, err := c.List(t.Context(), req)
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	verify := func(req *storepb.VerifyRequest) error {
		stream, err := c.Verify(t.Context(), req)
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	_, statErr := c.Stat(t.Context(), &storepb.StatRequest{Digests: []string{"x"}})
	_, keyErr := c.Stat(t.Context(), &storepb.StatRequest{Entries: []*storepb.EntryKey{{ActionDigest: "x"}}})
	_, manyErr := c.Remove(t.Context(), &storepb.RemoveRequest{Digests: many})
	_, removeErr := c.Remove(t.Context(), &storepb.RemoveRequest{Digests: []string{"../../etc/passwd/3"}})
	for name, err := range map[string]error{
		"Stat of no digest":           statErr,
		"Stat of no action":           keyErr,
		"Remove of too many":          manyErr,
		"Remove of no digest":         removeErr,
		"List of an unknown function": list(&storepb.ListRequest{DigestFunction: "md4"}),
		"Verify of no digest":         verify(&storepb.VerifyRequest{Digests: []string{""}}),
		"Verify at a negative rate":   verify(&storepb.VerifyRequest{BytesPerSecond: -1}),
	} {
		wantCode(t, name, err, codes.InvalidArgument)
	}
}

// TestAdmin_few_at_once: calls that read the whole store are bounded, and those
// whose clients are gone make room.
func TestAdmin_few_at_once(t *testing.T) {
	w := waiting{begun: make(chan struct{})}
	c := startAdmin(t, rpc.AdminOptions{Inventory: w, Anywhere: true})
	ctx, cancel := context.WithCancel(t.Context())
	for range 4 {
		if _, err := c.List(ctx, &storepb.ListRequest{}); err != nil {
			t.Fatal(err)
		}
		<-w.begun
	}
	_, err := c.Usage(t.Context(), &storepb.UsageRequest{})
	wantCode(t, "a fifth call", err, codes.Unavailable)
	cancel()
	for { // until a call that was cancelled has ended
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := c.List(ctx, &storepb.ListRequest{})
		if err != nil {
			t.Fatal(err)
		}
		refused := make(chan error, 1)
		go func() {
			_, err := stream.Recv()
			refused <- err
		}()
		select {
		case <-w.begun:
			cancel()
			wantCode(t, "the call that was let in", <-refused, codes.Canceled)
			return
		case err := <-refused:
			cancel()
			wantCode(t, "a call while others end", err, codes.Unavailable)
		}
	}
}

func TestAdmin_where(t *testing.T) {
	for _, tc := range []struct {
		addr     string
		anywhere bool
		want     codes.Code
	}{
		{"127.0.0.1:7777", false, codes.InvalidArgument}, // served: the request is bad
		{"[::1]:7777", false, codes.InvalidArgument},
		{"0.0.0.0:7777", false, codes.PermissionDenied},
		{"[::]:7777", false, codes.PermissionDenied},
		{"192.0.2.1:7777", false, codes.PermissionDenied},
		{"192.0.2.1:7777", true, codes.InvalidArgument},
	} {
		t.Run(tc.addr, func(t *testing.T) {
			addr, err := net.ResolveTCPAddr("tcp", tc.addr)
			if err != nil {
				t.Fatal(err)
			}
			c := startAdmin(t, rpc.AdminOptions{Addr: addr, Anywhere: tc.anywhere})
			_, err = c.Remove(t.Context(), &storepb.RemoveRequest{Digests: []string{"x"}})
			wantCode(t, "Remove", err, tc.want)
		})
	}
}
