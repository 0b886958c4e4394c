package creds_test

import (
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
)

// TestGuard_Admit: what the headers of a call tell is enough to refuse it, and what they
// don't tell is left to those who see the message.
func TestGuard_Admit(t *testing.T) {
	dir := t.TempDir()
	log := &lines{}
	one := newSigner(t, "one")
	credstest.Write(t, dir, "keys.json", one.keys())
	with := "issuers: [{issuer: https://issuer.example, audience: [mettle], jwks_file: keys.json}]" + fmt.Sprintf(jwtIdentities, "https://issuer.example")
	build := map[string]any{"groups": "build"}
	for name, tc := range map[string]struct {
		policy, token, method string
		want                  codes.Code
	}{
		"nobody":                       {usual(), "", "ContentAddressableStorage/BatchUpdateBlobs", codes.PermissionDenied},
		"nobody, who may":              {usual(), "", "ContentAddressableStorage/BatchReadBlobs", codes.OK},
		"nobody, where that is no one": {with, "", "ContentAddressableStorage/BatchReadBlobs", codes.Unauthenticated},
		"nobody, of what is for all":   {usual(), "", "Capabilities/GetCapabilities", codes.OK},
		"a wrong token":                {usual(), "x", "ContentAddressableStorage/BatchReadBlobs", codes.Unauthenticated},
		"one that is none":             {with, "x.y.z", "ContentAddressableStorage/BatchReadBlobs", codes.Unauthenticated},
		"one of another key":           {with, newSigner(t, "one").token(build), "ContentAddressableStorage/BatchReadBlobs", codes.Unauthenticated},
		"one of the issuer":            {with, one.token(build), "ContentAddressableStorage/BatchReadBlobs", codes.OK},
		"one without the right":        {with, one.token(build), "Execution/Execute", codes.PermissionDenied},
		"a token":                      {usual(), ciToken, "ContentAddressableStorage/BatchUpdateBlobs", codes.OK},
		"a token without the right":    {usual(), rootToken, "Execution/Execute", codes.PermissionDenied},
		"one that would be recorded":   {usual(), evesToken, "ActionCache/UpdateActionResult", codes.PermissionDenied},
	} {
		t.Run(name, func(t *testing.T) {
			g, err := creds.New(creds.Options{Policy: credstest.Write(t, dir, "policy.yaml", tc.policy), Audit: slog.New(slog.NewJSONHandler(log, nil)), PlaintextTokens: true})
			if err != nil {
				t.Fatal(err)
			}
			ctx := t.Context()
			if tc.token != "" {
				ctx = metadata.NewIncomingContext(ctx, metadata.Pairs("authorization", "Bearer "+tc.token))
			}
			if err := g.Admit(ctx, "/build.bazel.remote.execution.v2."+tc.method); status.Code(err) != tc.want {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
	if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "eve") {
		t.Errorf("the audit log has %d records, want the one of eve\n%s", n, log.String())
	}
}

// TestGuard_Admit_unknownKeys: of tokens that only their issuer could tell something of,
// messages are received as long as it may be asked, and no longer.
func TestGuard_Admit_unknownKeys(t *testing.T) {
	good := newSigner(t, "good")
	p := newProvider(t, good.keys())
	g, err := creds.New(creds.Options{
		Policy:          credstest.Write(t, t.TempDir(), "policy.yaml", fmt.Sprintf("issuers: [{issuer: %[1]q, audience: [mettle]}]"+jwtIdentities, p.URL)),
		PlaintextTokens: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	claims := map[string]any{"iss": p.URL, "groups": "build"}
	const method = "/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs"
	admit := func(token string) codes.Code {
		return status.Code(g.Admit(metadata.NewIncomingContext(t.Context(), metadata.Pairs("authorization", "Bearer "+token)), method))
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(g.ServerOptions()...)
	repb.RegisterContentAddressableStorageServer(srv, &service{})
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop()
		<-served //nolint:errcheck // it was stopped
	})
	s := &site{addr: l.Addr().String()}

	unknown := newSigner(t, "unknown").token(claims)
	forged := newSigner(t, "good").token(claims)
	for _, token := range []string{good.token(claims), unknown, forged} {
		if got := admit(token); got != codes.OK || p.asked.Load() != 0 {
			t.Errorf("before the issuer was asked: %v, and %d questions", got, p.asked.Load())
		}
	}
	if err := s.findWith(t, good.token(claims)); err != nil {
		t.Fatal(err)
	}
	if got := admit(forged); got != codes.Unauthenticated {
		t.Errorf("a forged token, of a key that is known: %v", got)
	}
	// Nothing waits for a time here: there is one question in ten seconds at most.
	for range 10 {
		if err := s.findWith(t, unknown); status.Code(err) != codes.Unauthenticated {
			t.Fatalf("an unknown key: %v", err)
		}
		if admit(unknown) == codes.Unauthenticated {
			if got := admit(good.token(claims)); got != codes.OK {
				t.Errorf("a good token: %v", got)
			}
			return
		}
	}
	t.Error("messages with tokens of unknown keys are received for ever")
}
