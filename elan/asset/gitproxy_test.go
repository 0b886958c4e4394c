package asset_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/elan/asset"
)

func TestProxy(t *testing.T) {
	plain := listenAt(t, "127.0.0.2", serving(strings.Repeat("x", 5000)))
	inside := listenAt(t, "127.0.0.1", serving("the keys"))
	tls := httptest.NewTLSServer(http.HandlerFunc(serving("encrypted")))
	t.Cleanup(tls.Close)
	trust := tls.Client().Transport.(*http.Transport).TLSClientConfig
	get := func(t *testing.T, tr *http.Transport, url string) (int, string, error) {
		t.Helper()
		tr.TLSClientConfig = trust.Clone()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(data), err
	}
	opts := func(o asset.Options) asset.Options {
		s := newStore(t)
		o.Store, o.Entries = s, s
		if o.AllowPrivate == nil {
			o.AllowPrivate = only("127.0.0.2")
		}
		return o
	}
	start := func(t *testing.T, o asset.Options) (*http.Transport, func() (bool, bool)) {
		t.Helper()
		tr, state, stop, err := asset.Proxy(t.Context(), opts(o))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(stop)
		return tr, state
	}
	t.Run("plain", func(t *testing.T) {
		tr, _ := start(t, asset.Options{})
		if code, body, err := get(t, tr, plain.URL); err != nil || code != 200 || len(body) != 5000 {
			t.Errorf("%d, %d bytes, %v", code, len(body), err)
		}
	})
	t.Run("encrypted", func(t *testing.T) {
		tr, _ := start(t, asset.Options{AllowPrivate: loopback()})
		if code, body, err := get(t, tr, tls.URL); err != nil || code != 200 || body != "encrypted" {
			t.Errorf("%d, %q, %v", code, body, err)
		}
	})
	t.Run("plain, inside", func(t *testing.T) {
		tr, state := start(t, asset.Options{})
		code, _, err := get(t, tr, inside.URL)
		if refused, _ := state(); err != nil || code != http.StatusForbidden || !refused {
			t.Errorf("%d, %v, refused %v", code, err, refused)
		}
	})
	t.Run("encrypted, inside", func(t *testing.T) {
		tr, state := start(t, asset.Options{})
		_, _, err := get(t, tr, tls.URL)
		if refused, _ := state(); err == nil || !refused {
			t.Errorf("%v, refused %v", err, refused)
		}
	})
	t.Run("without the password", func(t *testing.T) {
		tr, _ := start(t, asset.Options{AllowPrivate: loopback()})
		with := tr.Proxy
		tr.Proxy = func(r *http.Request) (*url.URL, error) {
			u, err := with(r)
			if err != nil {
				return nil, err
			}
			v := *u
			v.User = url.UserPassword("git", "guess")
			return &v, nil
		}
		if code, _, err := get(t, tr, plain.URL); err != nil || code != http.StatusProxyAuthRequired {
			t.Errorf("%d, %v", code, err)
		}
		if _, _, err := get(t, tr, tls.URL); err == nil {
			t.Error("a tunnel was made")
		}
	})
	t.Run("too much", func(t *testing.T) {
		tr, state := start(t, asset.Options{MaxBytes: 1000})
		_, body, err := get(t, tr, plain.URL)
		if _, over := state(); !over || (err == nil && len(body) > 1000) {
			t.Errorf("%d bytes, %v, over %v", len(body), err, over)
		}
	})
	t.Run("too much, encrypted", func(t *testing.T) {
		tr, state := start(t, asset.Options{MaxBytes: 100, AllowPrivate: loopback()})
		_, _, err := get(t, tr, tls.URL)
		if _, over := state(); err == nil || !over {
			t.Errorf("%v, over %v", err, over)
		}
	})
	if n := len(inside.requests()); n != 0 {
		t.Errorf("%d requests came inside", n)
	}
}
