package asset_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// loopback is where the tests' origins are.
func loopback() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
}

func newStore(t testing.TB) *mem.Store {
	t.Helper()
	s, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// newService makes a Service over the store, or one of its own, that may fetch from
// loopback unless o says otherwise. It ends with the test, and leaves no files.
func newService(t testing.TB, s *mem.Store, o asset.Options) *asset.Service {
	t.Helper()
	if o.Store == nil {
		if s == nil {
			s = newStore(t)
		}
		o.Store, o.Entries = s, s
	}
	if o.AllowPrivate == nil {
		o.AllowPrivate = loopback()
	}
	if o.RetryDelay == 0 {
		o.RetryDelay = time.Millisecond
	}
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	a, err := asset.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(o.Dir); err != nil || len(left) > 0 {
			t.Errorf("left in the spool: %v, %v", left, err)
		}
	})
	return a
}

// site is an origin that counts its requests.
type site struct {
	*httptest.Server
	mu   sync.Mutex // guards reqs
	reqs []*http.Request
}

func newSite(t testing.TB, h http.HandlerFunc) *site {
	t.Helper()
	s := &site{}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.reqs = append(s.reqs, r.Clone(context.WithoutCancel(r.Context())))
		s.mu.Unlock()
		h(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *site) requests() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*http.Request(nil), s.reqs...)
}

// serving serves the bytes at every path.
func serving(data string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(data)) }
}

// failing serves an HTTP status.
func failing(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", code) }
}

func of(data string) digest.Digest { return digest.Of(digest.SHA256, []byte(data)) }

// qualifiers makes qualifiers of names and values in turns.
func qualifiers(pairs ...string) []asset.Qualifier {
	var qs []asset.Qualifier
	for i := 0; i < len(pairs); i += 2 {
		qs = append(qs, asset.Qualifier{Name: pairs[i], Value: pairs[i+1]})
	}
	return qs
}

func request(uri string, pairs ...string) asset.Request {
	return asset.Request{URIs: []string{uri}, Qualifiers: qualifiers(pairs...)}
}

// wantBlob fetches, and fails the test unless it gets the bytes.
func wantBlob(t testing.TB, a *asset.Service, s blob.Opener, r asset.Request, want string) asset.Response {
	t.Helper()
	got, err := a.FetchBlob(t.Context(), r)
	if err != nil {
		t.Fatalf("fetch %v: %v", r.URIs, err)
	}
	data, err := blob.ReadAll(t.Context(), s, got.Digest, 1<<30)
	if err != nil || string(data) != want {
		t.Fatalf("fetch %v: %.100q, %v; want %.100q", r.URIs, data, err, want)
	}
	return got
}

// wantReason fails the test unless err is a FetchError for that reason which has
// the words, and not those of secrets.
func wantReason(t testing.TB, err error, want asset.Reason, words ...string) {
	t.Helper()
	f, ok := errors.AsType[*asset.FetchError](err)
	if !ok || f.Reason != want {
		t.Fatalf("%v (%T), want a FetchError, %v", err, err, want)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("%q gives a secret away", err)
	}
}

// sri is the sha256 of data as a checksum.
func sri(data string) string { return asset.SRI(of(data)) }
