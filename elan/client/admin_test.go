package client_test

import (
	"errors"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/inventory"
	"github.com/mettle-build/mettle/elan/inventory/inventorytest"
	"github.com/mettle-build/mettle/elan/rpc"
)

func TestAdmin(t *testing.T) {
	inventorytest.Run(t, func(t testing.TB, s blob.Store, e blob.Entries) inventory.Inventory {
		local, err := inventory.NewLocal(inventory.Options{Store: s, Entries: e})
		if err != nil {
			t.Fatal(err)
		}
		return client.NewAdmin(start(t, func(_ testing.TB, g *grpc.Server) {
			rpc.RegisterAdmin(g, rpc.AdminOptions{Inventory: local, Anywhere: true})
		}))
	})
}

// TestAdmin_not_served: the error says why, in words.
func TestAdmin_not_served(t *testing.T) {
	for _, tc := range []struct {
		name     string
		register func(testing.TB, *grpc.Server)
		want     string
	}{
		{"no such service", register, "offers no administration"},
		{"refused", func(_ testing.TB, g *grpc.Server) {
			rpc.RegisterAdmin(g, rpc.AdminOptions{Addr: &net.TCPAddr{IP: net.IPv4zero}})
		}, "starts it with --admin"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			admin := client.NewAdmin(start(t, tc.register))
			check := func(what string, err error) {
				t.Helper()
				if !errors.Is(err, inventory.ErrUnsupported) || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("%s: %v, want ErrUnsupported with %q", what, err, tc.want)
				}
			}
			ds := []digest.Digest{digest.Of(digest.SHA256, []byte("x"))}
			for _, err := range admin.Blobs(t.Context(), inventory.Filter{}) {
				check("Blobs", err)
			}
			for _, err := range admin.Verify(t.Context(), inventory.VerifyOptions{}) {
				check("Verify", err)
			}
			_, err := admin.Stat(t.Context(), ds)
			check("Stat", err)
			_, err = admin.Remove(t.Context(), ds)
			check("Remove", err)
			_, err = admin.Usage(t.Context())
			check("Usage", err)
		})
	}
}
