//go:build linux

package image_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mettle-build/mettle/mettle/worker/image"
)

func TestOpen_notFound(t *testing.T) {
	img := imageOf(t, pack(t, file("a", "a")))
	path := asLayout(t, img)
	reg := serve(t)
	ref := reg.push(t, "here", img)
	unknown := "@sha256:" + strings.Repeat("0", 64)
	c := open(t, image.Options{LocalDirs: []string{filepath.Dir(path)}, Registries: []string{reg.host, "registry.invalid"}, Tags: true})
	for name, ref := range map[string]string{
		"digest":     strings.Split(ref, "@")[0] + unknown,
		"repository": strings.Replace(ref, "here", "there", 1),
		"tag":        strings.Split(ref, "@")[0] + ":other",
		"in layout":  "oci://" + path + unknown,
		"layout":     "oci://" + path + "x" + unknown,
		"file":       "oci://" + path + "/index.json" + unknown,
		"its tag":    "oci://" + path + ":other",
		"host":       "docker://registry.invalid/a" + unknown,
	} {
		t.Run(name, func(t *testing.T) {
			if name == "host" {
				t.Skip("asks the resolver of the machine that the test runs on, which may be away")
			}
			if _, err := get(t, c, ref); !errors.Is(err, image.ErrUnusable) || !strings.Contains(err.Error(), ref) {
				t.Errorf("Open: %v", err)
			}
		})
	}
}

func TestOpen_registryAway(t *testing.T) {
	img := imageOf(t, pack(t, file("a", "a")))

	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadGateway)
	}))
	defer s.Close()
	c := open(t, image.Options{Registries: []string{"*"}})
	ref := "docker://" + strings.TrimPrefix(s.URL, "http://") + "/a@" + digestOf(t, img)
	if _, err := get(t, c, ref); !errors.Is(err, image.ErrUnavailable) || errors.Is(err, image.ErrUnusable) {
		t.Errorf("Open: %v", err)
	}
	s.Close()
	if _, err := get(t, c, ref); !errors.Is(err, image.ErrUnavailable) {
		t.Errorf("Open when it is gone: %v", err)
	}
}

func TestOpen_cancelled(t *testing.T) {
	asked, end := make(chan struct{}), make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		<-r.Context().Done() // the pull ends because nobody waits
		close(end)
	}))
	defer s.Close()
	c := open(t, image.Options{Registries: []string{"*"}})
	ref, err := c.Parse("docker://" + strings.TrimPrefix(s.URL, "http://") + "/a@sha256:" + strings.Repeat("0", 64))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("why")
	go func() {
		<-asked
		cancel(why)
	}()
	if _, err := c.Open(ctx, ref); !errors.Is(err, why) {
		t.Errorf("Open: %v", err)
	}
	<-end
}

func TestOpen_credentials(t *testing.T) {
	img := imageOf(t, pack(t, file("a", "a")))
	reg := serve(t)
	ref := reg.push(t, "a", img)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, ok := r.BasicAuth(); !ok || user != "me" || password != "secret" {
			w.Header().Set("WWW-Authenticate", "Basic realm=x")
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		reg.Config.Handler.ServeHTTP(w, r)
	}))
	defer s.Close()
	host := strings.TrimPrefix(s.URL, "http://")
	ref = strings.Replace(ref, reg.host, host, 1)
	for name, tc := range map[string]struct {
		file string
		ok   bool
	}{
		"none":         {"", false},
		"auth":         {`{"auths": {"https://` + host + `/v1/": {"auth": "bWU6c2VjcmV0"}}}`, true},
		"in the clear": {`{"auths": {"` + host + `": {"username": "me", "password": "secret"}}}`, true},
		"wrong":        {`{"auths": {"` + host + `": {"username": "me", "password": "x"}}}`, false},
		"of another":   {`{"auths": {"x.invalid": {"username": "me", "password": "secret"}}}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			o := image.Options{Registries: []string{host}}
			if tc.file != "" {
				o.DockerConfig = filepath.Join(t.TempDir(), "config.json")
				if err := os.WriteFile(o.DockerConfig, []byte(tc.file), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			_, err := get(t, open(t, o), ref)
			if tc.ok != (err == nil) || !tc.ok && !errors.Is(err, image.ErrUnusable) {
				t.Errorf("Open: %v", err)
			}
		})
	}
}

// A tag is asked for once in its time, and then what it has become.
func TestOpen_tagThatMoves(t *testing.T) {
	first, second := imageOf(t, pack(t, file("a", "1"))), imageOf(t, pack(t, file("a", "2")))
	reg := serve(t)
	ref, _, _ := strings.Cut(reg.push(t, "a", first), "@")
	for name, tc := range map[string]struct {
		o    image.Options
		want string
	}{
		"remembered": {image.Options{}, "1"},
		"over":       {image.Options{TagTTL: 1}, "2"},
	} {
		t.Run(name, func(t *testing.T) {
			tc.o.Registries, tc.o.Tags = []string{reg.host}, true
			reg.push(t, "a", first)
			c := open(t, tc.o)
			if got := mustGet(t, c, ref); read(t, got.Layers[0], "a") != "1" || got.Digest != digestOf(t, first) {
				t.Errorf("first: %s", got.Digest)
			}
			reg.push(t, "a", second)
			if got := mustGet(t, c, ref); read(t, got.Layers[0], "a") != tc.want {
				t.Errorf("then: %s", got.Digest)
			}
		})
	}
}

// Registries that the operator has not named are called at addresses only that may
// be, and none but those of this machine without TLS.
func TestOpen_guarded(t *testing.T) {
	img := imageOf(t, pack(t, file("a", "a")))
	reg := serve(t)
	ref := reg.push(t, "a", img)
	refuse := errors.New("not there")
	control := func(_ context.Context, _, address string, _ syscall.RawConn) error {
		if address != reg.host {
			t.Errorf("asked about %s", address)
		}
		return refuse
	}
	c := open(t, image.Options{Registries: []string{"*"}, Control: control})
	if _, err := get(t, c, ref); !errors.Is(err, image.ErrRefused) || !errors.Is(err, refuse) {
		t.Errorf("Open: %v", err)
	}
	mustGet(t, open(t, image.Options{Registries: []string{reg.host, "*"}, Control: control}), ref)
}

// A registry elsewhere that sends us on to plain HTTP, or has us log in there.
func TestOpen_plainHTTP(t *testing.T) {
	img := imageOf(t, pack(t, file("a", "a")))
	for name, h := range map[string]http.HandlerFunc{
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/v2/" {
				return
			}
			http.Redirect(w, r, "http://198.51.100.1/x", http.StatusFound)
		},
		"realm": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://198.51.100.1/token",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(h)
			defer s.Close()
			c := open(t, image.Options{Registries: []string{"*"}})
			_, err := get(t, c, "docker://"+strings.TrimPrefix(s.URL, "http://")+"/a@"+digestOf(t, img))
			if !errors.Is(err, image.ErrUnusable) || !strings.Contains(err.Error(), "without TLS") {
				t.Errorf("Open: %v", err)
			}
		})
	}
}

// A registry that never sends a layer holds up its own images, and not those of
// another that have the same layer, and one that forbids it forbids it to those who
// ask there.
func TestOpen_othersTrouble(t *testing.T) {
	img := imageOf(t, pack(t, file("a", "a")))
	reg := serve(t)
	ref := reg.push(t, "a", img)
	all, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	layer := digestOf(t, all[0])
	asked := make(chan struct{}, 1)
	hangs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, layer) {
			asked <- struct{}{}
			<-r.Context().Done()
			return
		}
		reg.Config.Handler.ServeHTTP(w, r)
	}))
	defer hangs.Close()
	c := open(t, image.Options{Registries: []string{"*"}})
	bad, err := c.Parse(strings.Replace(ref, reg.host, strings.TrimPrefix(hangs.URL, "http://"), 1))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := c.Open(ctx, bad)
		ended <- err
	}()
	<-asked
	mustGet(t, c, ref)
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Open: %v", err)
	}
}

func TestOpen_othersRight(t *testing.T) {
	img := imageOf(t, pack(t, file("a", "a")))
	reg := serve(t)
	reg.push(t, "open", img)
	ref := reg.push(t, "closed", img)
	all, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	layer := digestOf(t, all[0])
	asked, answer := make(chan struct{}), make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, layer) && strings.Contains(r.URL.Path, "closed") {
			close(asked)
			<-answer
			w.WriteHeader(http.StatusForbidden)
			return
		}
		reg.Config.Handler.ServeHTTP(w, r)
	}))
	defer s.Close()
	ref = strings.Replace(ref, reg.host, strings.TrimPrefix(s.URL, "http://"), 1)
	c := open(t, image.Options{Registries: []string{"*"}})
	closed, err := c.Parse(ref)
	if err != nil {
		t.Fatal(err)
	}
	refused := make(chan error, 1)
	go func() {
		img, err := c.Open(t.Context(), closed)
		if err == nil {
			img.Close()
		}
		refused <- err
	}()
	<-asked
	// At best when the other waits for the same; nobody can see that it does.
	time.AfterFunc(50*time.Millisecond, func() { close(answer) })
	mustGet(t, c, strings.Replace(ref, "closed", "open", 1))
	if err := <-refused; !errors.Is(err, image.ErrUnusable) {
		t.Errorf("Open: %v, want it refused", err)
	}
}
