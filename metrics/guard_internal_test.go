package metrics

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestHandler_otherSites: a site whose name resolves to loopback gets nothing by the
// browser of somebody at this machine.
func TestHandler_otherSites(t *testing.T) {
	s, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		at, host string
		want     int
	}{
		{"127.0.0.1:7779", "evil.example:7779", http.StatusForbidden},
		{"127.0.0.1:7779", "evil.example.", http.StatusForbidden},
		{"[::1]:7779", "127.0.0.1.evil.example", http.StatusForbidden},
		{"127.0.0.1:7779", "localhost:7779", http.StatusOK},
		{"127.0.0.1:7779", "127.0.0.1:7779", http.StatusOK},
		{"[::1]:7779", "[::1]:7779", http.StatusOK},
		{"127.0.0.1:7779", "laptop:7779", http.StatusOK},
		{"127.0.0.1:7779", "a.localhost", http.StatusOK},
		{"192.0.2.1:7779", "mettle.example", http.StatusOK},
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/healthz", nil)
		addr, err := net.ResolveTCPAddr("tcp", tc.at)
		if err != nil {
			t.Fatal(err)
		}
		r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, net.Addr(addr)))
		r.Host = tc.host
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		if w.Code != tc.want {
			t.Errorf("%s at %s: %d, want %d", tc.host, tc.at, w.Code, tc.want)
		}
	}
}

// TestCommandLine: whoever may see the profiles is not told the passwords in flags.
func TestCommandLine(t *testing.T) {
	got := withoutPasswords([]string{"mettle", "--queue=nats://user:p@ss:word@host:4222/x?a=b@c", "--storage", "https://token@host/p", "mail@example"})
	want := "mettle\x00--queue=nats://xxxxx@host:4222/x?a=b@c\x00--storage\x00https://xxxxx@host/p\x00mail@example"
	if got != want || strings.Contains(got, "ss:word") {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestWithoutSecret: a log line has nothing by which a log stream can be written.
func TestWithoutSecret(t *testing.T) {
	for in, want := range map[string]string{
		"main/logstreams/id/token": "main/logstreams/...",
		"logstreams/id":            "logstreams/...",
		"main/blobs/abc/1":         "main/blobs/abc/1",
	} {
		if got := withoutSecret(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
