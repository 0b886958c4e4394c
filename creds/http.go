package creds

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
)

// Transport is for requests by HTTP/1.1 to servers that are not ours, by the same
// files: TLS to those whose URL begins with https://, and the token to those and, by
// Check, to this machine. It goes by no proxy. The caller closes its idle connections.
// An error is of the files as they are now.
func (o Client) Transport() (http.RoundTripper, error) {
	h, err := o.handshakes()
	if err != nil {
		return nil, err
	}
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.Proxy = nil
	t.DialTLSContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := h.config()
		if err != nil {
			return nil, err
		}
		return (&tls.Dialer{Config: c}).DialContext(ctx, network, addr)
	}
	if o.TokenFile == "" {
		return t, nil
	}
	r := o.reloadedToken()
	if _, err := r.get(); err != nil {
		return nil, err
	}
	return &bearing{Transport: t, text: r}, nil
}

// bearing is a transport that sends a token.
type bearing struct {
	*http.Transport
	text *reloaded[string]
}

// RoundTrip implements http.RoundTripper.
func (b *bearing) RoundTrip(r *http.Request) (*http.Response, error) {
	text, err := b.text.get()
	if err != nil {
		return nil, err
	}
	r = r.Clone(r.Context()) // one that is given may not be changed
	r.Header.Set("Authorization", "Bearer "+text)
	return b.Transport.RoundTrip(r)
}
