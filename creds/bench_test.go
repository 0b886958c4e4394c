package creds_test

import (
	"context"
	"fmt"
	"net"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
)

// BenchmarkGuard_Admit is what it takes to look at the headers of a call.
func BenchmarkGuard_Admit(b *testing.B) {
	g, err := creds.New(creds.Options{Policy: credstest.Write(b, b.TempDir(), "policy.yaml", usual())})
	if err != nil {
		b.Fatal(err)
	}
	ctx := peer.NewContext(context.Background(), &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}})
	ctx = metadata.NewIncomingContext(ctx, metadata.Pairs("authorization", "Bearer "+ciToken, "user-agent", "x", "content-type", "y"))
	b.ReportAllocs()
	for b.Loop() {
		if err := g.Admit(ctx, repb.ActionCache_GetActionResult_FullMethodName); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkGuard_Admit_forged is what it takes to refuse a token that looks good but for
// its signature.
func BenchmarkGuard_Admit_forged(b *testing.B) {
	dir := b.TempDir()
	credstest.Write(b, dir, "keys.json", newSigner(b, "one").keys())
	with := "issuers: [{issuer: https://issuer.example, audience: [mettle], jwks_file: keys.json}]" + fmt.Sprintf(jwtIdentities, "https://issuer.example")
	g, err := creds.New(creds.Options{Policy: credstest.Write(b, dir, "policy.yaml", with), PlaintextTokens: true})
	if err != nil {
		b.Fatal(err)
	}
	ctx := metadata.NewIncomingContext(context.Background(), metadata.Pairs("authorization", "Bearer "+newSigner(b, "one").token(map[string]any{"groups": "build"})))
	b.ReportAllocs()
	for b.Loop() {
		if err := g.Admit(ctx, repb.ActionCache_GetActionResult_FullMethodName); err == nil {
			b.Fatal("it is taken")
		}
	}
}
