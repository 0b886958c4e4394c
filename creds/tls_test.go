package creds_test

import (
	"context"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
)

const certificatePolicy = `
identities:
  - name: workers
    certificate: {common_name: "worker-*"}
    rights: [cas:read]
  - name: mesh
    certificate: {uri: "spiffe://example/*", dns: "*"}
    rights: [cas:read]
`

func TestServerTLS(t *testing.T) {
	dir := t.TempDir()
	servers, clients := credstest.NewAuthority(t, "servers"), credstest.NewAuthority(t, "clients")
	cert, key := servers.Issue(dir, "server", credstest.Server())
	serversCA := credstest.Write(t, dir, "servers.pem", servers.PEM)
	clientsCA := credstest.Write(t, dir, "clients.pem", clients.PEM)
	worker := func(a *credstest.Authority, name string) creds.Client {
		c, k := a.Issue(dir, name, credstest.Client(name))
		return creds.Client{CA: serversCA, Cert: c, Key: k}
	}
	s := serve(t, creds.Options{Policy: credstest.Write(t, dir, "policy.yaml", certificatePolicy)},
		creds.ServerTLS{Cert: cert, Key: key, ClientCA: clientsCA}, &service{})
	spiffe := credstest.Client("")
	spiffe.URIs = []*url.URL{{Scheme: "spiffe", Host: "example", Path: "/worker"}}
	spiffe.DNSNames = []string{"w1"}
	spiffeCert, spiffeKey := clients.Issue(dir, "spiffe", spiffe)
	for name, tc := range map[string]struct {
		client creds.Client
		want   codes.Code
		says   string
	}{
		"a worker":                  {worker(clients, "worker-1"), codes.OK, ""},
		"by URI and DNS":            {creds.Client{CA: serversCA, Cert: spiffeCert, Key: spiffeKey}, codes.OK, ""},
		"somebody else":             {worker(clients, "printer"), codes.Unauthenticated, `the client certificate of "printer"`},
		"of another authority":      {worker(servers, "worker-2"), codes.Unauthenticated, "client certificate"},
		"no certificate":            {creds.Client{CA: serversCA}, codes.Unauthenticated, "client certificate"},
		"by the name":               {creds.Client{CA: serversCA, ServerName: "localhost"}, codes.Unauthenticated, "client certificate"},
		"by a wrong name":           {creds.Client{CA: serversCA, ServerName: "elsewhere"}, codes.Unavailable, "elsewhere"},
		"the authority is not ours": {creds.Client{CA: clientsCA}, codes.Unavailable, "certificate"},
		"that of the system":        {creds.Client{TLS: true}, codes.Unavailable, "certificate"},
		"no TLS":                    {creds.Client{}, codes.Unavailable, ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := find("")(t.Context(), s.dial(t, tc.client))
			if status.Code(err) != tc.want || err != nil && !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v, want %v with %q", err, tc.want, tc.says)
			}
		})
	}
}

func TestServerTLS_required(t *testing.T) {
	dir := t.TempDir()
	a := credstest.NewAuthority(t, "ours")
	cert, key := a.Issue(dir, "server", credstest.Server())
	ca := credstest.Write(t, dir, "ca.pem", a.PEM)
	s := serve(t, creds.Options{Policy: credstest.Write(t, dir, "policy.yaml", "anonymous: {rights: [cas:read]}")},
		creds.ServerTLS{Cert: cert, Key: key, ClientCA: ca, RequireClient: true, MinVersion: "1.3"}, &service{})
	if err := find("")(t.Context(), s.dial(t, creds.Client{CA: ca})); status.Code(err) != codes.Unavailable {
		t.Errorf("without a certificate: %v", err)
	}
	c, k := a.Issue(dir, "client", credstest.Client("anybody"))
	if err := find("")(t.Context(), s.dial(t, creds.Client{CA: ca, Cert: c, Key: k})); err != nil {
		t.Errorf("with one: %v", err)
	}
}

// TestServerTLS_reload renews the server's certificate, and both sides' authority,
// while both run.
func TestServerTLS_reload(t *testing.T) {
	dir := t.TempDir()
	old, renewed := credstest.NewAuthority(t, "old"), credstest.NewAuthority(t, "new")
	cert, key := old.Issue(dir, "server", credstest.Server())
	ca := credstest.Write(t, dir, "ca.pem", old.PEM)
	s := serve(t, creds.Options{Policy: credstest.Write(t, dir, "policy.yaml", "anonymous: {rights: [cas:read]}")}, creds.ServerTLS{Cert: cert, Key: key}, &service{})
	client := creds.Client{CA: ca}
	opts, err := client.DialOptions()
	if err != nil {
		t.Fatal(err)
	}
	call := func() error { return find("")(t.Context(), s.dialWith(t, opts...)) }
	if err := call(); err != nil {
		t.Fatal(err)
	}
	credstest.Write(t, dir, "server.key", "nothing") // a mistake on the way
	renewed.Issue(dir, "server", credstest.Server())
	becomes := func(what string, want codes.Code) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		for err := call(); status.Code(err) != want; err = call() {
			if ctx.Err() != nil {
				t.Fatalf("%s: %v, want %v", what, err, want)
			}
		}
	}
	becomes("a certificate by an authority that the client does not trust", codes.Unavailable)
	credstest.Write(t, dir, "ca.pem", renewed.PEM)
	becomes("the client trusts it", codes.OK)
}

func TestClient_token(t *testing.T) {
	dir := t.TempDir()
	a := credstest.NewAuthority(t, "ours")
	cert, key := a.Issue(dir, "server", credstest.Server())
	ca := credstest.Write(t, dir, "ca.pem", a.PEM)
	policy := credstest.Write(t, dir, "policy.yaml", usual())
	token := credstest.Write(t, dir, "token", ciToken+"\n")
	for name, tc := range map[string]struct {
		server creds.ServerTLS
		client creds.Client
	}{
		"TLS":      {creds.ServerTLS{Cert: cert, Key: key}, creds.Client{CA: ca, TokenFile: token}},
		"loopback": {creds.ServerTLS{}, creds.Client{TokenFile: token}},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, creds.Options{Policy: policy}, tc.server, &service{})
			if err := batch("main")(t.Context(), s.dial(t, tc.client)); err != nil {
				t.Error(err)
			}
		})
	}
	for name, tc := range map[string]struct {
		client creds.Client
		target string
		says   string
	}{
		"off this machine without TLS":  {creds.Client{TokenFile: token}, "elan.example:7777", "without TLS"},
		"by a resolver":                 {creds.Client{TokenFile: token}, "dns:///elan.example:7777", "without TLS"},
		"by another resolver":           {creds.Client{TokenFile: token}, "dns://localhost/elan.example:7777", "without TLS"},
		"with TLS":                      {creds.Client{TokenFile: token, TLS: true}, "elan.example:7777", ""},
		"asked for":                     {creds.Client{TokenFile: token, PlaintextToken: true}, "elan.example:7777", ""},
		"this machine":                  {creds.Client{TokenFile: token}, "dns:///localhost:7777", ""},
		"this machine by its address":   {creds.Client{TokenFile: token}, "[::1]:7777", ""},
		"a certificate without its key": {creds.Client{Cert: cert}, "localhost:1", "key"},
	} {
		t.Run(name, func(t *testing.T) {
			err := tc.client.Check(tc.target)
			if (err == nil) != (tc.says == "") || err != nil && !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v, want it to say %q", err, tc.says)
			}
		})
	}
	for name, c := range map[string]creds.Client{
		"two tokens": {TokenFile: credstest.Write(t, dir, "two", "a b")},
		"no token":   {TokenFile: credstest.Write(t, dir, "none", "\n")},
		"no file":    {TokenFile: dir + "/nowhere"},
		"no CA":      {CA: token},
		"a wrong CA": {CA: dir + "/nowhere"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := c.DialOptions(); err == nil || strings.Contains(err.Error(), ciToken) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestServerTLS_Check(t *testing.T) {
	for name, o := range map[string]creds.ServerTLS{
		"no key":            {Cert: "a"},
		"no certificate":    {Key: "a"},
		"clients alone":     {ClientCA: "a"},
		"required, unnamed": {Cert: "a", Key: "b", RequireClient: true},
		"an old version":    {Cert: "a", Key: "b", MinVersion: "1.1"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := o.Check(); err == nil {
				t.Error("no error")
			}
			if c, err := o.Credentials(); err == nil {
				t.Errorf("credentials %v", c)
			}
		})
	}
	if c, err := (creds.ServerTLS{}).Credentials(); c != nil || err != nil {
		t.Errorf("without TLS: %v, %v", c, err)
	}
}
