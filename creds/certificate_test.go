package creds_test

import (
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
)

// TestServerTLS_chain: a certificate is revoked by the serial number of the authority
// that issued it, where that is of another.
func TestServerTLS_chain(t *testing.T) {
	dir := t.TempDir()
	a := credstest.NewAuthority(t, "ours")
	cert, key := a.Issue(dir, "server", credstest.Server())
	ca := credstest.Write(t, dir, "ca.pem", a.PEM)
	team := a.Under("a team")
	serial := a.Serial()
	c, k := team.Issue(dir, "client", credstest.Client("worker-1"))
	leaf, err := os.ReadFile(c)
	if err != nil {
		t.Fatal(err)
	}
	credstest.Write(t, dir, "client.pem", string(leaf)+team.PEM)
	policy := "identities: [{name: workers, certificate: {common_name: \"worker-*\"}, rights: [cas:read]}]\n"
	for name, tc := range map[string]struct {
		policy string
		want   codes.Code
	}{
		"none is revoked": {policy, codes.OK},
		"another is":      {policy + "revoked_certificates: [\"abcdef\"]", codes.OK},
		"the team's is":   {policy + "revoked_certificates: [\"" + serial + "\"]", codes.Unauthenticated},
		"the client's is": {policy + "revoked_certificates: [\"" + team.Serial() + "\"]", codes.Unauthenticated},
	} {
		t.Run(name, func(t *testing.T) {
			path := credstest.Write(t, t.TempDir(), "policy.yaml", tc.policy)
			s := serve(t, creds.Options{Policy: path}, creds.ServerTLS{Cert: cert, Key: key, ClientCA: ca}, &service{})
			err := find("")(t.Context(), s.dial(t, creds.Client{CA: ca, Cert: c, Key: k}))
			if status.Code(err) != tc.want || err != nil && !strings.Contains(err.Error(), "revoked") {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

// TestCertificate_names: what a certificate calls its owner stands in logs, in results
// and in headers.
func TestCertificate_names(t *testing.T) {
	dir := t.TempDir()
	a := credstest.NewAuthority(t, "ours")
	cert, key := a.Issue(dir, "server", credstest.Server())
	ca := credstest.Write(t, dir, "ca.pem", a.PEM)
	path := credstest.Write(t, dir, "policy.yaml", "identities: [{name: workers, certificate: {common_name: \"worker-*\"}, rights: [cas:read]}]")
	s := serve(t, creds.Options{Policy: path}, creds.ServerTLS{Cert: cert, Key: key, ClientCA: ca}, &service{})
	for name, want := range map[string]codes.Code{
		"worker-é":                           codes.OK,
		"worker-1\ninfo: all is well":        codes.Unauthenticated,
		"worker-\x1b[2J":                     codes.Unauthenticated,
		"worker-" + strings.Repeat("x", 376): codes.OK,
		"worker-" + strings.Repeat("x", 377): codes.Unauthenticated,
	} {
		c, k := a.Issue(t.TempDir(), "client", credstest.Client(name))
		err := find("")(t.Context(), s.dial(t, creds.Client{CA: ca, Cert: c, Key: k}))
		if status.Code(err) != want || err != nil && !strings.Contains(err.Error(), "can be printed") {
			t.Errorf("%.30q: got %v, want %v", name, err, want)
		}
	}
}
