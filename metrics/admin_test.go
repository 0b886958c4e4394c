package metrics_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/mettle-build/mettle/metrics"
)

func TestServer_pages(t *testing.T) {
	ready := errors.New("store is full")
	for _, tc := range []struct {
		name, method, path string
		ready              error
		code               int
		body               string
	}{
		{"index", "GET", "/", nil, 200, "<title>mettle &lt;dual&gt;</title>"},
		{"metrics", "GET", "/metrics", nil, 200, "\ngo_goroutines "},
		{"build info", "GET", "/metrics", nil, 200, "\ngo_build_info{"},
		{"process", "GET", "/metrics", nil, 200, "\nprocess_resident_memory_bytes "},
		{"alive", "GET", "/healthz", nil, 200, "ok\n"},
		{"alive though not ready", "GET", "/healthz", ready, 200, "ok\n"},
		{"ready", "GET", "/readyz", nil, 200, "ok\n"},
		{"not ready says why", "GET", "/readyz", ready, 503, "store is full\n"},
		{"profiles", "GET", "/debug/pprof/", nil, 200, "goroutine"},
		{"one profile", "GET", "/debug/pprof/goroutine?debug=1", nil, 200, "goroutine profile: total"},
		{"unknown page", "GET", "/nothing", nil, 404, ""},
		{"wrong method", "POST", "/metrics", nil, 405, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := metrics.New(metrics.Options{Name: "mettle <dual>", Ready: func(context.Context) error { return tc.ready }})
			if err != nil {
				t.Fatal(err)
			}
			w := httptest.NewRecorder()
			s.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), tc.method, tc.path, nil))
			if w.Code != tc.code {
				t.Errorf("code %d, want %d", w.Code, tc.code)
			}
			if !strings.Contains(w.Body.String(), tc.body) {
				t.Errorf("body %.500q does not contain %q", w.Body, tc.body)
			}
		})
	}
}

func TestServer_notes(t *testing.T) {
	s, err := metrics.New(metrics.Options{Notes: func() []string { return []string{"the store is full", "it is Monday"} }})
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/readyz", nil))
	if want := "ok\nthe store is full\nit is Monday\n"; w.Code != 200 || w.Body.String() != want {
		t.Errorf("%d %q, want 200 %q", w.Code, w.Body, want)
	}
}

func TestServer_readyCheckHasDeadline(t *testing.T) {
	s, err := metrics.New(metrics.Options{Ready: func(ctx context.Context) error {
		if _, ok := ctx.Deadline(); !ok {
			t.Error("the readiness check has no deadline")
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	s.Handler().ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), "GET", "/readyz", nil))
}

func TestServer_Serve_endsWithContext(t *testing.T) {
	asked, leave := make(chan struct{}), make(chan struct{})
	s, err := metrics.New(metrics.Options{Ready: func(context.Context) error {
		close(asked)
		<-leave
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()

	body := make(chan string, 1)
	go func() { body <- get(t, "http://"+l.Addr().String()+"/readyz") }()
	<-asked
	cancel() // with a request in flight, which may still finish
	close(leave)
	if got := <-body; got != "ok\n" {
		t.Errorf("the request in flight got %q, want ok", got)
	}
	select {
	case err := <-served:
		if err != nil {
			t.Errorf("Serve: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("Serve did not return after its context ended")
	}
	if c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", l.Addr().String()); err == nil {
		_ = c.Close()
		t.Error("the listener is still open")
	}
}

func TestServer_Serve_reportsListener(t *testing.T) {
	s, err := metrics.New(metrics.Options{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(t.Context(), l); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve on a closed listener: %v, want net.ErrClosed", err)
	}
}

func get(t *testing.T, url string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Error(err)
		return ""
	}
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Error(err)
		return ""
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Error(err)
	}
	return string(b)
}

func TestServer_index_shows_tables_and_pages(t *testing.T) {
	var trouble error
	s, err := metrics.New(metrics.Options{
		Ready: func(context.Context) error { return nil },
		Notes: func() []string { return []string{"it is <Monday>"} },
		Pages: []metrics.Page{{Path: "/more.json", Note: "more", Handler: http.NotFoundHandler()}},
		Tables: func(context.Context) ([]metrics.Table, error) {
			return []metrics.Table{{Title: "T&C", Rows: []metrics.Row{{Name: "n", Value: "v", Note: "<b>"}}}}, trouble
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	index := func() string {
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
		return w.Body.String()
	}
	for _, want := range []string{"<h2>T&amp;C</h2>", "<td>n<td>v<td class=\"note\">&lt;b&gt;", `<a href="/more.json">`, "Takes work.", "it is &lt;Monday&gt;"} {
		if got := index(); !strings.Contains(got, want) {
			t.Errorf("the index page has no %q:\n%s", want, got)
		}
	}
	trouble = errors.New("no figures")
	if got := index(); !strings.Contains(got, "no figures") {
		t.Errorf("the index page does not tell of trouble:\n%s", got)
	}
}
