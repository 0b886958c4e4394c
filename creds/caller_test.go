package creds_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
	"github.com/mettle-build/mettle/elan/wire"
)

// provider is an issuer of tokens that counts who asks it.
type provider struct {
	*httptest.Server
	asked   atomic.Int32
	keys    atomic.Pointer[string] // what it publishes
	moved   atomic.Pointer[string] // where its keys are, if not here
	forward atomic.Pointer[string] // where it redirects those who ask for them
}

func newProvider(t *testing.T, keys string) *provider {
	t.Helper()
	p := &provider{}
	p.keys.Store(&keys)
	mux := http.NewServeMux()
	p.Server = httptest.NewServer(mux)
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		at := p.URL + "/keys"
		if m := p.moved.Load(); m != nil {
			at = *m
		}
		fmt.Fprintf(w, `{"issuer": %q, "jwks_uri": %q}`, p.URL, at)
	})
	mux.HandleFunc("/keys", func(w http.ResponseWriter, r *http.Request) {
		p.asked.Add(1)
		if to := p.forward.Load(); to != nil {
			http.Redirect(w, r, *to, http.StatusFound)
			return
		}
		fmt.Fprint(w, *p.keys.Load())
	})
	t.Cleanup(func() {
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
		p.Close()
	})
	return p
}

// site is a server that takes the provider's tokens.
func (p *provider) site(t *testing.T, o creds.Options) *site {
	t.Helper()
	o.Policy = credstest.Write(t, t.TempDir(), "policy.yaml", fmt.Sprintf("issuers: [{issuer: %[1]q, audience: [mettle]}]"+jwtIdentities, p.URL))
	return serve(t, o, creds.ServerTLS{}, &service{})
}

func (s *site) findWith(t *testing.T, token string) error {
	t.Helper()
	return find("")(t.Context(), s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+token))))
}

// TestIssuer_isNotFlooded: tokens that name keys that nobody has are no way to have
// this server ask the issuer as often as one likes.
func TestIssuer_isNotFlooded(t *testing.T) {
	good := newSigner(t, "good")
	p := newProvider(t, good.keys())
	s := p.site(t, creds.Options{})
	claims := map[string]any{"iss": p.URL, "groups": "build"}
	start := time.Now()
	if err := s.findWith(t, good.token(claims)); err != nil {
		t.Fatal(err)
	}
	c := s.dialWith(t)
	for i := range 50 {
		token := newSigner(t, fmt.Sprint("unknown-", i)).token(claims)
		err := find("")(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token), c)
		if status.Code(err) != codes.Unauthenticated {
			t.Fatalf("an unknown key: %v", err)
		}
	}
	bad := newSigner(t, "good").token(claims) // of a name that is known, by another key
	if err := s.findWith(t, bad); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a forged token: %v", err)
	}
	if n, most := int(p.asked.Load()), 3+int(time.Since(start)/(10*time.Second)); n > most {
		t.Errorf("50 forged tokens made %d questions to the issuer, want %d at most", n, most)
	}
	if err := s.findWith(t, good.token(claims)); err != nil {
		t.Errorf("a good token after that: %v", err)
	}
}

// TestIssuer_answers: what an issuer may answer, and what not.
func TestIssuer_answers(t *testing.T) {
	good := newSigner(t, "good")
	many := `{"keys": [` + strings.Repeat(`{"kty":"oct","k":"AA"},`, 100) + `{}]}`
	symmetric := `{"keys": [{"kty":"oct","k":"c2VjcmV0","kid":"good"}]}`
	odd := strings.Replace(good.keys(), `{"keys":[`, `{"keys":[{"kty":"OKP","crv":"Ed448","x":"AA"},`, 1)
	for name, tc := range map[string]struct {
		keys, moved, forward string
		want                 codes.Code
		says                 string
	}{
		"its keys":                 {good.keys(), "", "", codes.OK, ""},
		"keys of an unknown kind":  {odd, "", "", codes.OK, ""},
		"gigabytes":                {good.keys() + strings.Repeat(" ", 1<<20), "", "", codes.Unavailable, "more than 1048576 bytes"},
		"too many keys":            {many, "", "", codes.Unavailable, "101 keys"},
		"a symmetric key":          {symmetric, "", "", codes.Unavailable, "no public key"},
		"none":                     {`{"keys":[]}`, "", "", codes.Unavailable, "no key for signatures"},
		"no JSON":                  {"<html>", "", "", codes.Unavailable, "not a JSON Web Key Set"},
		"keys by plain HTTP":       {good.keys(), "http://keys.example/", "", codes.Unavailable, "want https://"},
		"a way to plain HTTP":      {good.keys(), "", "http://keys.example/", codes.Unavailable, "want https://"},
		"a file":                   {good.keys(), "file:///etc/passwd", "", codes.Unavailable, "want https://"},
		"itself as another issuer": {good.keys(), "", "", codes.Unavailable, "is that of"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProvider(t, tc.keys)
			if tc.moved != "" {
				p.moved.Store(&tc.moved)
			}
			if tc.forward != "" {
				p.forward.Store(&tc.forward)
			}
			issuer := p.URL
			if strings.HasPrefix(name, "itself") { // the same server, by another name
				issuer = strings.Replace(p.URL, "127.0.0.1", "localhost", 1)
				p.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					fmt.Fprintf(w, `{"issuer": %q, "jwks_uri": %q}`, p.URL, p.URL+"/keys")
				})
			}
			path := credstest.Write(t, t.TempDir(), "policy.yaml", fmt.Sprintf("issuers: [{issuer: %[1]q, audience: [mettle]}]"+jwtIdentities, issuer))
			log := &lines{}
			s := serve(t, creds.Options{Policy: path, Logger: slog.New(slog.NewTextHandler(log, nil))}, creds.ServerTLS{}, &service{})
			token := good.token(map[string]any{"iss": issuer, "groups": "build"})
			for range 2 {
				if err := s.findWith(t, token); status.Code(err) != tc.want || tc.says != "" && strings.Contains(err.Error(), tc.says) {
					t.Errorf("got %v, want %v, and the reason for the operator alone", err, tc.want)
				}
			}
			if n := strings.Count(log.String(), tc.says); tc.says != "" && n != 1 {
				t.Errorf("the log has %q %d times, want it once\n%s", tc.says, n, log.String())
			}
		})
	}
}

// TestGuard_jwt_subjects: who a token's claims say the caller is can be told apart, and
// printed.
func TestGuard_jwt_subjects(t *testing.T) {
	dir := t.TempDir()
	good := newSigner(t, "one")
	credstest.Write(t, dir, "keys.json", good.keys())
	policy := `
issuers: [{issuer: https://issuer.example, audience: [mettle], jwks_file: keys.json}]
identities:
- {name: number, jwt: {issuer: https://issuer.example, claims: {project: ["9007199254740993"]}}, rights: [ac:read], limits: {concurrent_calls: 3, calls_per_second: 1000}}
- {name: anybody, jwt: {issuer: https://issuer.example, claims: {any: ["*"]}}, rights: [ac:read], limits: {concurrent_calls: 2}}
`
	s := serve(t, creds.Options{Policy: credstest.Write(t, dir, "policy.yaml", policy)}, creds.ServerTLS{}, &service{})
	for name, tc := range map[string]struct {
		claims map[string]any
		want   string
		says   string
	}{
		"a large number":              {map[string]any{"project": json.Number("9007199254740993")}, "number:alice", ""},
		"the number next to it":       {map[string]any{"project": json.Number("9007199254740992")}, "", "nothing is granted"},
		"an object is no value":       {map[string]any{"any": map[string]any{"a": 1}}, "", "nothing is granted"},
		"lists in lists are no value": {map[string]any{"any": []any{[]any{"a"}}}, "", "nothing is granted"},
		"null is no value":            {map[string]any{"any": []any{nil}}, "", "nothing is granted"},
		"a number as subject":         {map[string]any{"any": "a", "sub": json.Number("12345678")}, "anybody:12345678", ""},
		"no subject":                  {map[string]any{"any": "a", "sub": nil}, "", `no claim "sub"`},
		"an empty subject":            {map[string]any{"any": "a", "sub": ""}, "", `no claim "sub"`},
		"a long subject":              {map[string]any{"any": "a", "sub": strings.Repeat("x", 256)}, "", "256 bytes"},
		"a subject of two lines":      {map[string]any{"any": "a", "sub": "a\nlevel=INFO"}, "", "can't be printed"},
		"a subject that turns around": {map[string]any{"any": "a", "sub": "a\u202e"}, "", "can't be printed"},
	} {
		t.Run(name, func(t *testing.T) {
			c := s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+good.token(tc.claims))))
			r, err := c.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{})
			if tc.want != "" && (err != nil || string(r.StdoutRaw) != tc.want) {
				t.Errorf("the caller is %q, %v; want %q", r.GetStdoutRaw(), err, tc.want)
			}
			if tc.want == "" && (status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), tc.says)) {
				t.Errorf("got %v, want UNAUTHENTICATED with %q", err, tc.says)
			}
		})
	}
}

// TestGuard_limits_add: every limit holds of all rules that somebody meets, whichever
// is first.
func TestGuard_limits_add(t *testing.T) {
	good := newSigner(t, "one")
	rules := []string{
		`{name: a, jwt: {issuer: https://issuer.example, claims: {a: ["*"]}}, rights: [ac:read], limits: {concurrent_calls: 7}}`,
		`{name: b, jwt: {issuer: https://issuer.example, claims: {b: ["*"]}}, rights: [cas:read], limits: {concurrent_calls: 1}}`,
	}
	for _, order := range [][]int{{0, 1}, {1, 0}} {
		dir := t.TempDir()
		credstest.Write(t, dir, "keys.json", good.keys())
		policy := "issuers: [{issuer: https://issuer.example, audience: [mettle], jwks_file: keys.json}]\nidentities:\n- " + rules[order[0]] + "\n- " + rules[order[1]]
		svc := &service{hold: make(chan struct{}), in: make(chan struct{})}
		s := serve(t, creds.Options{Policy: credstest.Write(t, dir, "policy.yaml", policy)}, creds.ServerTLS{}, svc)
		c := s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+good.token(map[string]any{"a": "x", "b": "x"}))))
		done := make(chan error, 1)
		go func() { done <- result("")(t.Context(), c) }()
		<-svc.in
		if err := find("")(t.Context(), c); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("rules in the order %v: a second call at once: %v, want that the limit of 1 holds", order, err)
		}
		close(svc.hold)
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestGuard_actsFor: a server that may act for others says for whom it calls, and it
// counts from nobody else.
func TestGuard_actsFor(t *testing.T) {
	policy := fmt.Sprintf(`
identities:
- {name: api, token_sha256: [%s], rights: [ac:read, ac:write], acts_for: true}
- {name: eve, token_sha256: [%s], rights: [ac:read, ac:write]}
`, hashOf(ciToken), hashOf(evesToken))
	log := &lines{}
	svc := &service{}
	s := serve(t, creds.Options{
		Policy: credstest.Write(t, t.TempDir(), "policy.yaml", policy), Audit: slog.New(slog.NewJSONHandler(log, nil)),
	}, creds.ServerTLS{}, svc)
	for name, tc := range map[string]struct {
		token    string
		names    []string
		identity string
		code     codes.Code
	}{
		"a server for somebody":      {ciToken, []string{"developers:älice@example.com"}, "api for developers:älice@example.com", codes.OK},
		"a server for itself":        {ciToken, nil, "api", codes.OK},
		"a server for nobody":        {ciToken, []string{""}, "", codes.Unauthenticated},
		"a server for two":           {ciToken, []string{"a", "b"}, "", codes.Unauthenticated},
		"a server for a line break":  {ciToken, []string{"a\nb"}, "", codes.Unauthenticated},
		"a server for no text":       {ciToken, []string{"\xff"}, "", codes.Unauthenticated},
		"a server for a long name":   {ciToken, []string{strings.Repeat("x", 513)}, "", codes.Unauthenticated},
		"somebody for somebody else": {evesToken, []string{"ci"}, "eve", codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			for _, n := range tc.names {
				ctx = metadata.AppendToOutgoingContext(ctx, wire.ActsForHeader, n)
			}
			c := s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+tc.token)))
			r, err := c.ac.GetActionResult(ctx, &repb.GetActionResultRequest{})
			if status.Code(err) != tc.code || string(r.GetStdoutRaw()) != tc.identity {
				t.Errorf("the caller is %q, %v; want %q, %v", r.GetStdoutRaw(), err, tc.identity, tc.code)
			}
			if err != nil {
				return
			}
			if err := update("")(ctx, c); err != nil {
				t.Fatal(err)
			}
			all := strings.Split(strings.TrimSpace(log.String()), "\n")
			var rec struct{ Identity, For string }
			if err := json.Unmarshal([]byte(all[len(all)-1]), &rec); err != nil {
				t.Fatal(err)
			}
			if rec.For != "" {
				rec.Identity += " for " + rec.For
			}
			if rec.Identity != tc.identity {
				t.Errorf("the audit log says %q, want %q", rec.Identity, tc.identity)
			}
		})
	}
	if svc.behind.Load() > 0 {
		t.Error("a handler has seen the header")
	}
}

// TestExposedFiles: secrets that every user of the machine can read are warned of.
func TestExposedFiles(t *testing.T) {
	dir := t.TempDir()
	a := credstest.NewAuthority(t, "ours")
	cert, key := a.Issue(dir, "server", credstest.Server())
	tokens := credstest.Write(t, dir, "tokens", ciToken)
	path := credstest.Write(t, dir, "policy.yaml", "identities: [{name: ci, token_file: tokens, rights: [cas:read]}]")
	warnings := func() []string {
		var buf bytes.Buffer
		log := slog.New(slog.NewTextHandler(&buf, nil))
		if _, err := creds.New(creds.Options{Policy: path, Logger: log}); err != nil {
			t.Fatal(err)
		}
		if _, err := (creds.ServerTLS{Cert: cert, Key: key, Logger: log}).Config(); err != nil {
			t.Fatal(err)
		}
		if _, err := (creds.Client{CA: cert, Cert: cert, Key: key, TokenFile: tokens, Logger: log}).DialOptions(); err != nil {
			t.Fatal(err)
		}
		var files []string
		for line := range strings.Lines(buf.String()) {
			_, file, _ := strings.Cut(line, "file=")
			file, _, _ = strings.Cut(file, " ")
			files = append(files, filepath.Base(file))
		}
		return files
	}
	if got := warnings(); got != nil {
		t.Errorf("of files for their owner alone: %q", got)
	}
	for _, f := range []string{tokens, key, cert} {
		if err := os.Chmod(f, 0o644); err != nil { //nolint:gosec // that is what is wrong
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"tokens", "server.key", "server.key", "tokens"}, warnings()); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
}

// TestServerTLS_stillGood: what became of a certificate since its connection was made
// counts for each call.
func TestServerTLS_stillGood(t *testing.T) {
	dir := t.TempDir()
	a := credstest.NewAuthority(t, "ours")
	cert, key := a.Issue(dir, "server", credstest.Server())
	ca := credstest.Write(t, dir, "ca.pem", a.PEM)
	c, k := a.Issue(dir, "client", credstest.Client("worker-1"))
	policy := "identities: [{name: workers, certificate: {common_name: \"worker-*\"}, rights: [cas:read]}]\n"
	path := credstest.Write(t, dir, "policy.yaml", policy)
	s := serve(t, creds.Options{Policy: path, ReloadEvery: 5 * time.Millisecond}, creds.ServerTLS{Cert: cert, Key: key, ClientCA: ca}, &service{})
	worker := s.dial(t, creds.Client{CA: ca, Cert: c, Key: k})
	if err := find("")(t.Context(), worker); err != nil {
		t.Fatal(err)
	}
	credstest.Write(t, dir, "policy.yaml", policy+"revoked_certificates: [\"0"+strings.ToUpper(a.Serial())+"\"]")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err := find("")(ctx, worker)
	for err == nil && ctx.Err() == nil {
		err = find("")(ctx, worker)
	}
	if status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("on the same connection: %v", err)
	}
}
