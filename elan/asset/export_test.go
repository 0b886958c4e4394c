package asset

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"

	"github.com/mettle-build/mettle/elan/digest"
)

// SRI is d's hash as checksum.sri has it.
func SRI(d digest.Digest) string {
	c, _ := checksumOf(d)
	return c.String()
}

// ParseSRI returns the one spelling of a checksum.sri.
func ParseSRI(s string) (string, error) {
	cs, err := parseSRI(s)
	return cs.String(), err
}

// Origin is what is shown of a URI.
func Origin(uri string) string { return origin(uri) }

// CheckQualifiers reads qualifiers as a request with that many URIs.
func CheckQualifiers(dir bool, uris []string, qs []Qualifier) error {
	k := blobs
	if dir {
		k = directories
	}
	w, err := newWant(k, Request{URIs: uris, Qualifiers: qs})
	if err != nil {
		return err
	}
	_, err = w.sources()
	return err
}

// SetOwn replaces the list of this machine's addresses.
func (g *Guard) SetOwn(own func() ([]net.Addr, error)) { g.own = own }

// SetResolver lets the HTTP fetcher resolve names by r.
func (s *Service) SetResolver(r *net.Resolver, o Options) {
	d := &net.Dialer{Resolver: r, ControlContext: s.guard.Control}
	s.http.transport.DialContext = d.DialContext
}

// Proxy is a proxy for git.
func Proxy(ctx context.Context, o Options) (*http.Transport, func() (refused, over bool), func(), error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, nil, nil, err
	}
	p, err := startProxy(ctx, o, NewGuard(o.AllowPrivate))
	if err != nil {
		return nil, nil, nil, err
	}
	t := &http.Transport{Proxy: http.ProxyURL(p.url)}
	return t, func() (bool, bool) { return p.refused.Load(), p.over.Load() }, func() { t.CloseIdleConnections(); p.close(ctx) }, nil
}

// Waiting is how many callers wait for flights.
func (s *Service) Waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for f := range s.aloft {
		n += f.waiters
	}
	return n
}

// TrustFor lets the HTTP fetcher trust what c trusts.
func (s *Service) TrustFor(c *http.Client) {
	s.http.transport.TLSClientConfig = c.Transport.(*http.Transport).TLSClientConfig.Clone()
}

// Unpack unpacks an archive into the store.
func (s *Service) Unpack(ctx context.Context, data []byte) (digest.Digest, error) {
	u := s.newUploader(s.o.Stores(""), digest.SHA256)
	b := &builder{}
	if err := unpack(ctx, io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data))), u, b); err != nil {
		return digest.Digest{}, err
	}
	return b.store(ctx, u, "")
}
