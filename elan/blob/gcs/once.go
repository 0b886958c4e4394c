package gcs

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"
)

// onceKey is the key of a request's *atomic.Bool, which says that it was made.
type onceKey struct{}

var errOnce = errors.New("the connection broke")

// withOnce returns a context under which one request can be made. The library
// replaces a connection that breaks while a blob is read, as often as it breaks;
// elan/blob/bucket does that too, counts, and so ends.
func withOnce(ctx context.Context) context.Context {
	return context.WithValue(ctx, onceKey{}, new(atomic.Bool))
}

// once holds requests to what withOnce says.
type once struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (o once) RoundTrip(req *http.Request) (*http.Response, error) {
	if made, ok := req.Context().Value(onceKey{}).(*atomic.Bool); ok && made.Swap(true) {
		return nil, errOnce
	}
	return o.RoundTripper.RoundTrip(req)
}
