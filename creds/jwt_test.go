package creds_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
)

// signer makes tokens.
type signer struct {
	t   testing.TB
	key *ecdsa.PrivateKey
	id  string
}

func newSigner(t testing.TB, id string) *signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &signer{t, key, id}
}

// keys is the public half, as a JSON Web Key Set.
func (s *signer) keys() string {
	s.t.Helper()
	data, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: &s.key.PublicKey, KeyID: s.id, Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		s.t.Fatal(err)
	}
	return string(data)
}

func (s *signer) token(claims map[string]any) string {
	s.t.Helper()
	sig, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: s.key, KeyID: s.id}}, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	all := map[string]any{"iss": "https://issuer.example", "aud": "mettle", "sub": "alice", "exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix()}
	for k, v := range claims {
		if all[k] = v; v == nil {
			delete(all, k)
		}
	}
	raw, err := jwt.Signed(sig).Claims(all).Serialize()
	if err != nil {
		s.t.Fatal(err)
	}
	return raw
}

const jwtIdentities = `
identities:
  - name: developers
    jwt: {issuer: %[1]q, claims: {groups: [build, "eng-*"]}}
    rights: [cas:read, ac:read]
  - name: ci
    jwt: {issuer: %[1]q, claims: {repository: ["org/*"], protected: ["true"]}}
    rights: [cas:write]
    instances: [main]
`

func TestGuard_jwt(t *testing.T) {
	dir := t.TempDir()
	good, other := newSigner(t, "one"), newSigner(t, "one")
	credstest.Write(t, dir, "keys.json", good.keys())
	policy := fmt.Sprintf("issuers: [{issuer: https://issuer.example, audience: [mettle, other], jwks_file: keys.json}]"+jwtIdentities, "https://issuer.example")
	s := serve(t, creds.Options{Policy: credstest.Write(t, dir, "policy.yaml", policy)}, creds.ServerTLS{}, &service{})
	build := map[string]any{"groups": []string{"x", "build"}}
	with := func(m map[string]any, kv ...any) map[string]any {
		out := map[string]any{}
		maps.Copy(out, m)
		for i := 0; i < len(kv); i += 2 {
			out[kv[i].(string)] = kv[i+1]
		}
		return out
	}
	unsigned := strings.Split(good.token(build), ".")
	for name, tc := range map[string]struct {
		token string
		want  codes.Code
		says  string
	}{
		"of a group":             {good.token(build), codes.OK, ""},
		"of one group":           {good.token(map[string]any{"groups": "eng-tools"}), codes.OK, ""},
		"for several":            {good.token(with(build, "aud", []string{"x", "other"})), codes.OK, ""},
		"of another group":       {good.token(map[string]any{"groups": []string{"sales"}}), codes.Unauthenticated, "nothing is granted to alice"},
		"without groups":         {good.token(nil), codes.Unauthenticated, "nothing is granted"},
		"for another service":    {good.token(with(build, "aud", "elsewhere")), codes.Unauthenticated, `the token is for ["elsewhere"]`},
		"expired":                {good.token(with(build, "exp", time.Now().Add(-2*time.Minute).Unix())), codes.Unauthenticated, "expired"},
		"expired a moment ago":   {good.token(with(build, "exp", time.Now().Add(-10*time.Second).Unix())), codes.OK, ""},
		"without an end":         {good.token(with(build, "exp", nil)), codes.Unauthenticated, "not valid"},
		"not valid yet":          {good.token(with(build, "nbf", time.Now().Add(time.Hour).Unix())), codes.Unauthenticated, "not valid"},
		"of another issuer":      {good.token(with(build, "iss", "https://evil.example")), codes.Unauthenticated, "issuer that is not known"},
		"by another key":         {other.token(build), codes.Unauthenticated, "not valid"},
		"with other claims":      {unsigned[0] + "." + strings.Split(good.token(map[string]any{"groups": "eng-x"}), ".")[1] + "." + unsigned[2], codes.Unauthenticated, "not valid"},
		"without a signature":    {"eyJhbGciOiJub25lIn0." + unsigned[1] + ".", codes.Unauthenticated, "nor a JSON Web Token"},
		"by a symmetric key":     {"eyJhbGciOiJIUzI1NiJ9." + unsigned[1] + "." + unsigned[2], codes.Unauthenticated, "nor a JSON Web Token"},
		"that is no token":       {"x.y.z", codes.Unauthenticated, "nor a JSON Web Token"},
		"that is no word at all": {"%%%", codes.Unauthenticated, "nor a JSON Web Token"},
	} {
		t.Run(name, func(t *testing.T) {
			c := s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+tc.token)))
			for range 2 { // the second time it is remembered
				if err := find("main")(t.Context(), c); status.Code(err) != tc.want || err != nil && !strings.Contains(err.Error(), tc.says) {
					t.Errorf("got %v, want %v with %q", err, tc.want, tc.says)
				}
			}
		})
	}
	t.Run("rules add up", func(t *testing.T) {
		c := s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+good.token(with(build, "repository", "org/tools", "protected", true)))))
		if err := batch("main")(t.Context(), c); err != nil {
			t.Error(err)
		}
		if err := batch("other")(t.Context(), c); status.Code(err) != codes.PermissionDenied {
			t.Errorf("at another instance: %v", err)
		}
		r, err := c.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{})
		if err != nil || string(r.StdoutRaw) != "developers:alice" {
			t.Errorf("the caller is %q, %v", r.GetStdoutRaw(), err)
		}
	})
}

// TestGuard_oidc asks an issuer for its keys, which it changes, and which is away
// at first.
func TestGuard_oidc(t *testing.T) {
	var away atomic.Bool
	var keys atomic.Pointer[signer]
	mux := http.NewServeMux()
	issuer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if away.Load() {
			http.Error(w, "away", http.StatusServiceUnavailable)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(issuer.Close)
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"issuer": %q, "jwks_uri": %q}`, issuer.URL, issuer.URL+"/keys")
	})
	mux.HandleFunc("/keys", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, keys.Load().keys()) })
	t.Cleanup(http.DefaultTransport.(*http.Transport).CloseIdleConnections)

	policy := fmt.Sprintf("issuers: [{issuer: %[1]q, audience: [mettle]}]"+jwtIdentities, issuer.URL)
	first, second := newSigner(t, "one"), newSigner(t, "two")
	keys.Store(first)
	claims := map[string]any{"iss": issuer.URL, "groups": "build"}
	another := func() *site {
		return serve(t, creds.Options{Policy: credstest.Write(t, t.TempDir(), "policy.yaml", policy)}, creds.ServerTLS{}, &service{})
	}
	s := another()
	call := func(s *site, token string) error {
		return find("")(t.Context(), s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+token))))
	}
	if err := call(s, first.token(claims)); err != nil {
		t.Fatalf("a token of the issuer: %v", err)
	}
	keys.Store(second)
	if err := call(s, second.token(claims)); err != nil {
		t.Errorf("a token by the issuer's next key: %v", err)
	}
	if err := call(s, newSigner(t, "three").token(claims)); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a token by nobody's key: %v", err)
	}
	away.Store(true)
	if err := call(s, second.token(claims)); err != nil {
		t.Errorf("a token by a known key, the issuer being away: %v", err)
	}
	if err := call(another(), second.token(claims)); status.Code(err) != codes.Unavailable {
		t.Errorf("no key is known, and the issuer is away: %v, want a status on which clients try again", err)
	}
}
