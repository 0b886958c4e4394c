package asset_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

func TestFetchBlob(t *testing.T) {
	large := strings.Repeat("0123456789abcdef", 200_000) // over what stays in memory
	for _, tc := range []struct {
		name, data string
		fn         digest.Function
	}{
		{"small", "hello", digest.SHA256},
		{"large", large, digest.SHA256},
		{"empty", "", digest.SHA256},
		{"blake3", "hello", digest.BLAKE3},
		{"a function that begins with the size", "hello", digest.GITSHA1},
		{"the same, large", large, digest.GITSHA1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := newSite(t, serving(tc.data))
			s := newStore(t)
			a := newService(t, s, asset.Options{MinLifetime: time.Hour})
			r := request(o.URL + "/x")
			r.Function = tc.fn
			before := time.Now()
			got := wantBlob(t, a, s, r, tc.data)
			if got.Digest != digest.Of(tc.fn, []byte(tc.data)) || got.URI != o.URL+"/x" {
				t.Errorf("%v", got)
			}
			if got.ExpiresAt.Before(before.Add(time.Hour)) {
				t.Errorf("expires at %v, want an hour from now", got.ExpiresAt)
			}
			if again := wantBlob(t, a, s, r, tc.data); again.Digest != got.Digest || len(o.requests()) != 1 {
				t.Errorf("%v, and %d requests; want one", again, len(o.requests()))
			}
			req := o.requests()[0]
			if e := req.Header.Get("Accept-Encoding"); e != "identity" || req.Header.Get("User-Agent") == "" {
				t.Errorf("headers %v", req.Header)
			}
		})
	}
}

// TestFetchBlob_intoFiles adopts large files into the file store, and what was
// fetched is still known after a restart.
func TestFetchBlob_intoFiles(t *testing.T) {
	large := strings.Repeat("0123456789abcdef", 200_000)
	o := newSite(t, serving(large))
	dir, spool := t.TempDir(), t.TempDir()
	for range 2 {
		s, err := file.New(file.Options{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		a, err := asset.New(asset.Options{Store: s, Entries: s, Dir: spool, AllowPrivate: loopback()})
		if err != nil {
			t.Fatal(err)
		}
		wantBlob(t, a, s, request(o.URL, "checksum.sri", sri(large)), large)
		if err := errors.Join(a.Close(), s.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(o.requests()); n != 1 {
		t.Errorf("%d requests, want one", n)
	}
}

func TestFetchBlob_failures(t *testing.T) {
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	for _, tc := range []struct {
		name     string
		h        http.HandlerFunc
		pairs    []string
		reason   asset.Reason
		words    string
		requests int
	}{
		{"not found", failing(404), nil, asset.NotFound, "404", 1},
		{"gone", failing(410), nil, asset.NotFound, "410", 1},
		{"forbidden", failing(403), nil, asset.Denied, "403", 1},
		{"unauthorized", failing(401), nil, asset.Denied, "401", 1},
		{"broken", failing(500), nil, asset.Aborted, "500", 3},
		{"bad gateway", failing(502), nil, asset.Aborted, "502", 3},
		{"too many requests", failing(429), nil, asset.Busy, "429", 3},
		{"a part", failing(206), nil, asset.Aborted, "206", 1},
		{"no content", failing(204), nil, asset.Aborted, "204", 1},
		{"another file", serving("other"), []string{"checksum.sri", sri("hello")}, asset.Aborted, sri("other"), 1},
		{"huge, and says so", serving(strings.Repeat("x", 2000)), nil, asset.TooLarge, "2000", 1},
		{"huge without a word", func(w http.ResponseWriter, _ *http.Request) {
			for range 100 {
				_, _ = w.Write(make([]byte, 100))
				w.(http.Flusher).Flush()
			}
		}, nil, asset.TooLarge, "1000", 1},
		{"truncated", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			_, _ = w.Write([]byte("short"))
		}, nil, asset.Aborted, "broke off", 3},
		{"silent", func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write([]byte("begin"))
			w.(http.Flusher).Flush()
			select {
			case <-hang:
			case <-r.Context().Done():
			}
		}, nil, asset.Aborted, "sent nothing", 3},
		{"silent from the beginning", func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-hang:
			case <-r.Context().Done():
			}
		}, nil, asset.Aborted, "timeout", 3},
		{"another type", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			_, _ = w.Write([]byte("please log in"))
		}, []string{"resource_type", "application/zip"}, asset.Aborted, "text/html", 1},
		{"redirects without end", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path+"x", http.StatusFound)
		}, nil, asset.Aborted, "redirects", 11},
		{"a redirect to a file", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		}, nil, asset.Denied, "file:", 1},
		{"a redirect to nowhere", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "http://secret:secret@[/?token=secret")
			w.WriteHeader(http.StatusFound)
		}, nil, asset.Aborted, "redirect", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := newSite(t, tc.h)
			a := newService(t, nil, asset.Options{MaxBytes: 1000, IdleTimeout: 100 * time.Millisecond})
			r := request(o.URL+"/secret?token=secret", tc.pairs...)
			_, err := a.FetchBlob(t.Context(), r)
			wantReason(t, err, tc.reason, tc.words, o.URL)
			if n := len(o.requests()); n != tc.requests {
				t.Errorf("%d requests, want %d", n, tc.requests)
			}
		})
	}
}

func TestFetchBlob_triesAgain(t *testing.T) {
	var n atomic.Int32
	o := newSite(t, func(w http.ResponseWriter, _ *http.Request) {
		switch n.Add(1) {
		case 1:
			http.Error(w, "busy", http.StatusServiceUnavailable)
		case 2:
			w.Header().Set("Content-Length", "5")
			_, _ = w.Write([]byte("hel"))
		default:
			_, _ = w.Write([]byte("hello"))
		}
	})
	s := newStore(t)
	wantBlob(t, newService(t, s, asset.Options{}), s, request(o.URL, "checksum.sri", sri("hello")), "hello")
}

// TestFetchBlob_retryAfter: who asks for a long pause is not asked again.
func TestFetchBlob_retryAfter(t *testing.T) {
	o := newSite(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "3600")
		http.Error(w, "later", http.StatusTooManyRequests)
	})
	_, err := newService(t, nil, asset.Options{}).FetchBlob(t.Context(), request(o.URL))
	wantReason(t, err, asset.Busy, "429")
	if len(o.requests()) != 1 {
		t.Errorf("%d requests, want one", len(o.requests()))
	}
}

func TestFetchBlob_mirrors(t *testing.T) {
	dead := httptest.NewServer(nil)
	dead.Close()
	missing, wrong, good := newSite(t, failing(404)), newSite(t, serving("wrong")), newSite(t, serving("hello"))
	s := newStore(t)
	a := newService(t, s, asset.Options{})
	r := asset.Request{
		URIs:       []string{dead.URL, "urn:x:y", missing.URL, wrong.URL, good.URL + "/a"},
		Qualifiers: qualifiers("checksum.sri", sri("hello")),
	}
	if got := wantBlob(t, a, s, r, "hello"); got.URI != good.URL+"/a" {
		t.Errorf("from %s, want the last", got.URI)
	}
	// Without the good one, the answer names the last that was tried, and all.
	r = asset.Request{URIs: []string{missing.URL + "/1", wrong.URL + "/1"}, Qualifiers: qualifiers("checksum.sri", sri("HELLO"))}
	_, err := a.FetchBlob(t.Context(), r)
	wantReason(t, err, asset.Aborted, "checksum", "404", missing.URL, wrong.URL)
	if f, _ := errors.AsType[*asset.FetchError](err); f.URI != r.URIs[1] {
		t.Errorf("about %s, want %s", f.URI, r.URIs[1])
	}
}

// TestFetchBlob_compressed: what is compressed at the origin stays so.
func TestFetchBlob_compressed(t *testing.T) {
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, _ = w.Write([]byte(strings.Repeat("hello", 1000)))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	o := newSite(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Content-Type", "application/x-tar")
		_, _ = w.Write(z.Bytes())
	})
	s := newStore(t)
	wantBlob(t, newService(t, s, asset.Options{}), s, request(o.URL, "checksum.sri", sri(z.String())), z.String())
}

func TestFetchBlob_headers(t *testing.T) {
	var back string
	far := newSite(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/back" {
			http.Redirect(w, r, back, http.StatusFound)
			return
		}
		_, _ = w.Write([]byte("hello"))
	})
	near := newSite(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/away" {
			http.Redirect(w, r, far.URL+"/there", http.StatusFound)
			return
		}
		if r.URL.Path == "/round" {
			http.Redirect(w, r, far.URL+"/back", http.StatusFound)
			return
		}
		if r.URL.Path == "/here" {
			http.Redirect(w, r, "/end", http.StatusFound)
			return
		}
		_, _ = w.Write([]byte("hello"))
	})
	back = near.URL + "/returned"
	s := newStore(t)
	a := newService(t, s, asset.Options{})
	auth := fmt.Sprintf(`{%q: {"X-Old": "secret-old"}, %q: {"X-Host": "host"}, "http://elsewhere/": {"X-Else": "no"}}`,
		near.URL+"/here", strings.TrimPrefix(near.URL, "http://"))
	r := request(near.URL+"/here",
		"http_header:X-All", "all", "http_header:User-Agent", "mine", "http_header:X-Both", "worse",
		"http_header_url:0:X-Both", "better", "bazel.auth_headers", auth, "checksum.sri", sri("hello"))
	r.Qualifiers = append(r.Qualifiers, asset.Qualifier{Name: "http_header_url:0:X-Both", Value: "and more"})
	wantBlob(t, a, s, r, "hello")
	for _, req := range near.requests() {
		h := req.Header
		if h.Get("X-All") != "all" || h.Get("User-Agent") != "mine" || strings.Join(h["X-Both"], ",") != "better,and more" ||
			h.Get("X-Old") != "secret-old" || h.Get("X-Host") != "host" || h.Get("X-Else") != "" || h.Get("Referer") != "" {
			t.Errorf("%s: headers %v", req.URL, h)
		}
	}
	if len(near.requests()) != 2 {
		t.Fatalf("%d requests, want 2", len(near.requests()))
	}
	// To another host go none of them, nor a password in the URL.
	away := request(strings.Replace(near.URL, "://", "://user:secret@", 1)+"/away", "http_header:Private-Token", "secret", "http_header:User-Agent", "mine")
	wantBlob(t, a, s, away, "hello")
	h := far.requests()[0].Header
	if h.Get("Private-Token") != "" || h.Get("Authorization") != "" || h.Get("User-Agent") == "mine" || h.Get("Referer") != "" {
		t.Errorf("to another host: %v", h)
	}
	if u, p, _ := near.requests()[2].BasicAuth(); u != "user" || p != "secret" {
		t.Errorf("user %q and password %q, want those of the URL", u, p)
	}
	// Nor back from there: who sends us here may be anybody.
	wantBlob(t, a, s, request(near.URL+"/round", "http_header:Private-Token", "secret"), "hello")
	last := near.requests()[len(near.requests())-1]
	if last.URL.Path != "/returned" || last.Header.Get("Private-Token") != "" {
		t.Errorf("back at %s: %v", last.URL, last.Header)
	}
}

// TestFetchBlob_certificate: nobody else may answer for an origin.
func TestFetchBlob_certificate(t *testing.T) {
	o := httptest.NewUnstartedServer(serving("hello"))
	o.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	o.StartTLS()
	t.Cleanup(o.Close)
	_, err := newService(t, nil, asset.Options{}).FetchBlob(t.Context(), request(o.URL))
	wantReason(t, err, asset.Aborted, "certificate")
}

// TestFetchBlob_downgrade: a redirect away from encryption needs a checksum.
func TestFetchBlob_downgrade(t *testing.T) {
	plain := newSite(t, serving("hello"))
	o := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain.URL, http.StatusFound)
	}))
	t.Cleanup(o.Close)
	s := newStore(t)
	a := newService(t, s, asset.Options{})
	a.TrustFor(o.Client())
	_, err := a.FetchBlob(t.Context(), request(o.URL))
	wantReason(t, err, asset.Denied, "https to http")
	wantBlob(t, a, s, request(o.URL, "checksum.sri", sri("hello")), "hello")
}

// TestFetchBlob_timeouts: the request's own timeout, and the server's.
func TestFetchBlob_timeouts(t *testing.T) {
	hang := make(chan struct{})
	o := newSite(t, func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-hang:
		case <-r.Context().Done():
		}
	})
	t.Cleanup(func() { close(hang) })
	for name, tc := range map[string]struct{ server, request time.Duration }{
		"the request's":             {time.Hour, 20 * time.Millisecond},
		"the server's":              {20 * time.Millisecond, 0},
		"the server's, the shorter": {20 * time.Millisecond, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			a := newService(t, nil, asset.Options{Timeout: tc.server})
			r := request(o.URL + "/" + strconv.Itoa(len(name)))
			r.Timeout = tc.request
			_, err := a.FetchBlob(t.Context(), r)
			wantReason(t, err, asset.TimedOut)
		})
	}
}

// TestFetchBlob_cancelled: a fetch that nobody waits for ends.
func TestFetchBlob_cancelled(t *testing.T) {
	began := make(chan struct{})
	ended := make(chan struct{})
	o := newSite(t, func(_ http.ResponseWriter, r *http.Request) {
		close(began)
		<-r.Context().Done()
		close(ended)
	})
	a := newService(t, nil, asset.Options{IdleTimeout: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() {
		_, err := a.FetchBlob(ctx, request(o.URL))
		failed <- err
	}()
	<-began
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want Canceled", err)
	}
	<-ended // the fetch too
}
