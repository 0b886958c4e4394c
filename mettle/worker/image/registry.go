//go:build linux

package image

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	regtransport "github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// registry is the source of images of one repository.
type registry struct {
	ref    Reference
	puller *remote.Puller
}

var _ source = (*registry)(nil)

// maxPullers bounds the repositories that we stay logged in to.
const maxPullers = 64

// registry is the source of ref. It is used again, so that one does not log in
// for each layer.
func (c *Cache) registry(ref Reference) (*registry, error) {
	key := ref.repository()
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.pullers[key]; p != nil {
		return &registry{ref, p}, nil
	}
	t := c.guarded
	if ref.listed {
		t = c.free
	}
	p, err := remote.NewPuller(remote.WithTransport(t), remote.WithAuthFromKeychain(keychain(c.o.DockerConfig)), remote.WithUserAgent("mettle"),
		remote.WithRetryBackoff(remote.Backoff{Duration: 500 * time.Millisecond, Factor: 3, Jitter: 0.1, Steps: 3}))
	if err != nil {
		return nil, err
	}
	if len(c.pullers) >= maxPullers {
		clear(c.pullers)
	}
	c.pullers[key] = p
	return &registry{ref, p}, nil
}

func (r *registry) manifest(ctx context.Context, digest v1.Hash) ([]byte, error) {
	var ref name.Reference = r.ref.repo.Tag(r.ref.tag)
	if digest != (v1.Hash{}) {
		ref = r.ref.repo.Digest(digest.String())
	}
	d, err := r.puller.Get(ctx, ref)
	if err != nil {
		return nil, unavailable(err)
	}
	if len(d.Manifest) > maxManifest {
		return nil, fmt.Errorf("%w: its manifest is over %d bytes", ErrUnusable, maxManifest)
	}
	return d.Manifest, nil
}

func (r *registry) blob(ctx context.Context, digest v1.Hash) (io.ReadCloser, error) {
	l, err := r.puller.Layer(ctx, r.ref.repo.Digest(digest.String()))
	if err != nil {
		return nil, unavailable(err)
	}
	rc, err := l.Compressed()
	if err != nil {
		return nil, unavailable(err)
	}
	return rc, nil
}

// unavailable gives an error of reading from a source its class: what the registry
// refuses, it refuses again.
func unavailable(err error) error {
	if errors.Is(err, ErrUnusable) || errors.Is(err, ErrUnavailable) || errors.Is(err, ErrRefused) {
		return err
	}
	if e, ok := errors.AsType[*net.DNSError](err); ok && e.IsNotFound {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	if e, ok := errors.AsType[*regtransport.Error](err); ok && !e.Temporary() && e.StatusCode >= 400 && e.StatusCode < 500 && e.StatusCode != http.StatusTooManyRequests {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// transport is http.Transport without what must not be sent in the clear.
type transport struct{ *http.Transport }

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !isLoopback(req.URL.Hostname()) {
		return nil, fmt.Errorf("%w: %s speaks HTTP without TLS, which is for registries on this machine only", ErrUnusable, req.URL.Host)
	}
	return t.Transport.RoundTrip(req)
}

func isLoopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback() || host == "localhost"
}

// transports makes the ones for registries that the operator has named, and for
// all others.
func transports(control func(context.Context, string, string, syscall.RawConn) error) (free, guarded *transport) {
	to := func(control func(context.Context, string, string, syscall.RawConn) error) *transport {
		d := net.Dialer{Timeout: 15 * time.Second, KeepAlive: 30 * time.Second, ControlContext: control}
		return &transport{&http.Transport{
			Proxy: http.ProxyFromEnvironment, DialContext: d.DialContext, ForceAttemptHTTP2: true,
			TLSHandshakeTimeout: 15 * time.Second, ResponseHeaderTimeout: time.Minute, IdleConnTimeout: 30 * time.Second,
			MaxIdleConns: 16, MaxIdleConnsPerHost: pullsAtOnce,
		}}
	}
	free = to(nil)
	if control == nil || hasProxy() {
		return free, to(nil)
	}
	return free, to(func(ctx context.Context, network, address string, conn syscall.RawConn) error {
		if err := control(ctx, network, address, conn); err != nil {
			return fmt.Errorf("%w: %w", ErrRefused, err)
		}
		return nil
	})
}

func hasProxy() bool {
	for _, name := range []string{"HTTPS_PROXY", "https_proxy"} {
		if os.Getenv(name) != "" {
			return true
		}
	}
	return false
}

// keychain is a file of credentials in the form of Docker's, "" for none. The file
// is read each time: credentials expire, and others take their place.
type keychain string

// Resolve implements authn.Keychain.
func (k keychain) Resolve(res authn.Resource) (authn.Authenticator, error) {
	if k == "" {
		return authn.Anonymous, nil
	}
	return credentials{string(k), res.RegistryStr()}, nil
}

// credentials are those for one registry.
type credentials struct{ file, registry string }

// Authorization implements authn.Authenticator.
func (c credentials) Authorization() (*authn.AuthConfig, error) {
	data, err := os.ReadFile(c.file)
	if err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	var f struct {
		Auths map[string]struct {
			Auth, Username, Password, IdentityToken, RegistryToken string
		}
	}
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("credentials in %s are not in the form of docker login", c.file) // what is in it is nobody's business
	}
	for host, a := range f.Auths {
		host = strings.TrimPrefix(strings.TrimPrefix(host, "https://"), "http://")
		if host, _, _ = strings.Cut(host, "/"); canonical(host) != c.registry {
			continue
		}
		cfg := &authn.AuthConfig{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken}
		if a.Auth != "" {
			plain, err := base64.StdEncoding.DecodeString(a.Auth)
			user, password, ok := strings.Cut(string(plain), ":")
			if err != nil || !ok {
				return nil, fmt.Errorf("credentials for %s in %s are not in the form of docker login", c.registry, c.file)
			}
			cfg.Username, cfg.Password = user, password
		}
		return cfg, nil
	}
	return &authn.AuthConfig{}, nil
}
