package bucket

import (
	"net"
	"net/http"
	"time"
)

// NewTransport returns the transport of a driver, for connections to one host.
// It speaks HTTP/1.1, as buckets' own tools do: HTTP/2 would put all requests
// on one connection, which has the throughput of one.
func NewTransport(maxRequests int) *http.Transport {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           dialer.DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: time.Second,
		MaxIdleConnsPerHost:   maxRequests,
		IdleConnTimeout:       90 * time.Second,
		Protocols:             protocols,
		DisableCompression:    true, // a blob is read as it is
		WriteBufferSize:       64 << 10,
		ReadBufferSize:        64 << 10,
	}
}

// Limit returns a RoundTripper over base with at most maxRequests requests
// under way at once, each from its first byte to the head of its answer. The
// others wait, until their contexts end.
func Limit(base http.RoundTripper, maxRequests int) http.RoundTripper {
	return &limited{base: base, slots: make(chan struct{}, maxRequests)}
}

type limited struct {
	base  http.RoundTripper
	slots chan struct{} // holds a token for each request under way
}

// RoundTrip implements http.RoundTripper.
func (l *limited) RoundTrip(req *http.Request) (*http.Response, error) {
	select {
	case l.slots <- struct{}{}:
	case <-req.Context().Done():
		if req.Body != nil {
			_ = req.Body.Close() // as every RoundTripper has to
		}
		return nil, req.Context().Err()
	}
	defer func() { <-l.slots }()
	return l.base.RoundTrip(req)
}
