package creds_test

import (
	"crypto/tls"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
)

func TestClient_Transport(t *testing.T) {
	dir := t.TempDir()
	servers, clients := credstest.NewAuthority(t, "servers"), credstest.NewAuthority(t, "clients")
	certFile, keyFile := servers.Issue(dir, "server", credstest.Server())
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Header.Get("Authorization"))
		for _, c := range r.TLS.PeerCertificates {
			_, _ = io.WriteString(w, " from "+c.Subject.CommonName)
		}
	}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12}
	s.StartTLS()
	defer s.Close()
	ca := credstest.Write(t, dir, "servers.pem", servers.PEM)
	token := credstest.Write(t, dir, "token", "secret\n")
	own, ownKey := clients.Issue(dir, "w", credstest.Client("w"))
	for name, tc := range map[string]struct {
		client creds.Client
		want   string // in the answer
		fails  string // in the error
	}{
		"the authority":             {creds.Client{CA: ca}, "", ""},
		"a token":                   {creds.Client{CA: ca, TokenFile: token}, "Bearer secret", ""},
		"a certificate":             {creds.Client{CA: ca, Cert: own, Key: ownKey}, " from w", ""},
		"that of the system":        {creds.Client{TLS: true}, "", "certificate"},
		"a token that is not there": {creds.Client{CA: ca, TokenFile: dir + "/none"}, "", "none"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := get(t, tc.client, s.URL)
			if (err == nil) != (tc.fails == "") || err != nil && !strings.Contains(err.Error(), tc.fails) || got != tc.want {
				t.Errorf("%q, %v; want %q, %q", got, err, tc.want, tc.fails)
			}
		})
	}
}

func get(t *testing.T, c creds.Client, url string) (string, error) {
	t.Helper()
	transport, err := c.Transport()
	if err != nil {
		return "", err
	}
	client := &http.Client{Transport: transport}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}
