package asset

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	// maxAttempts are made of each URI. What fails three times is for the next
	// mirror, or for the client to try again.
	maxAttempts = 3
	// maxRedirects is what browsers and curl's users live with.
	maxRedirects = 10
	// maxRetryAfter is the longest pause that an origin may ask for.
	maxRetryAfter = 30 * time.Second
	// maxAnswerHeaders bounds the headers of an answer, in bytes.
	maxAnswerHeaders = 256 << 10
	userAgent        = "mettle-elan"
	// copyBytes are read at once: large enough that calls do not count beside hashing.
	copyBytes = 128 << 10
)

// httpFetcher fetches by http and https.
type httpFetcher struct {
	o         Options
	transport *http.Transport
}

func newHTTPFetcher(o Options, g *Guard) *httpFetcher {
	return &httpFetcher{o: o, transport: newTransport(o, g)}
}

// newTransport makes connections that the guard has agreed to.
func newTransport(o Options, g *Guard) *http.Transport {
	dialer := &net.Dialer{Timeout: o.ConnectTimeout, ControlContext: g.Control}
	return &http.Transport{
		// No Proxy: it would resolve names by itself, out of the guard's sight.
		DialContext:            dialer.DialContext,
		ForceAttemptHTTP2:      true,
		DisableCompression:     true, // a file is what the origin has, compressed or not
		TLSHandshakeTimeout:    o.ConnectTimeout,
		ResponseHeaderTimeout:  o.IdleTimeout,
		IdleConnTimeout:        time.Minute,
		MaxIdleConns:           64,
		MaxResponseHeaderBytes: maxAnswerHeaders,
	}
}

func (h *httpFetcher) close() { h.transport.CloseIdleConnections() }

// fetch reads what is at src into sp, until an attempt succeeds or it makes no
// sense to go on, and returns the checksum that was compared. What the origin is
// to blame for is a FetchError without a URI.
func (h *httpFetcher) fetch(ctx context.Context, w *want, src source, sp *spool) (checksum, error) {
	for attempt := 1; ; attempt++ {
		if err := sp.reset(w.fn, w.sums); err != nil {
			return checksum{}, err
		}
		err := h.attempt(ctx, w, src, sp)
		if err == nil {
			return sp.sums.check(w.sums)
		}
		if sp.err != nil {
			return checksum{}, sp.err
		}
		again, ok := errors.AsType[*retryError](err)
		if !ok {
			return checksum{}, err
		}
		if attempt == maxAttempts || ctx.Err() != nil {
			return checksum{}, again.err
		}
		h.o.Logger.DebugContext(ctx, "fetching again", "origin", origin(src.uri), "error", again.err)
		select {
		case <-time.After(max(again.after, h.backoff(attempt))):
		case <-ctx.Done():
			return checksum{}, again.err
		}
	}
}

// backoff is the pause after an attempt: twice as long each time, and up to a
// half more so that many clients do not come back at once.
func (h *httpFetcher) backoff(attempt int) time.Duration {
	d := h.o.RetryDelay << (attempt - 1)
	return d + rand.N(d/2+1) //nolint:gosec // nobody guesses at it
}

// retryError is a failure that may not last.
type retryError struct {
	err   error
	after time.Duration // what the origin asked for
}

func (e *retryError) Error() string { return e.err.Error() }
func (e *retryError) Unwrap() error { return e.err }

func retry(r Reason, format string, args ...any) error {
	return &retryError{err: failed(r, format, args...)}
}

// attempt makes one request and reads the answer.
func (h *httpFetcher) attempt(ctx context.Context, w *want, src source, sp *spool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, src.url.String(), nil)
	if err != nil {
		return failed(NotFound, "the URL is malformed")
	}
	req.Header = w.headers.of(src.index, src.url, src.uri)
	own := req.Header.Clone()
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", userAgent)
	}
	req.Header.Set("Accept-Encoding", "identity")
	client := &http.Client{Transport: h.transport, CheckRedirect: redirects(own, len(w.sums) > 0)}
	resp, err := client.Do(req) //nolint:bodyclose // closed below
	if err != nil {
		return classify(err)
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end, or given up
	if err := checkAnswer(resp, w, sp.max); err != nil {
		return err
	}
	body := &watched{r: resp.Body, idle: h.o.IdleTimeout, timer: time.AfterFunc(h.o.IdleTimeout, func() { cancel(errStalled) })}
	defer body.timer.Stop()
	if _, err := io.CopyBuffer(sp, body, make([]byte, copyBytes)); err != nil {
		if errors.Is(context.Cause(ctx), errStalled) {
			err = errStalled
		}
		return classify(err)
	}
	return nil
}

// watched starts a timer anew with each read.
type watched struct {
	r     io.Reader
	idle  time.Duration
	timer *time.Timer
}

// Read implements io.Reader.
func (b *watched) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.timer.Reset(b.idle)
	return n, err
}

// redirects checks each redirect. The headers that a client set go to the host that
// it named and to no other, and none to where everybody can read along; where
// nothing but the connection vouches for the bytes, that stays encrypted. The
// addresses are checked when they are dialled.
func redirects(own http.Header, checked bool) func(*http.Request, []*http.Request) error {
	away := false
	return func(req *http.Request, via []*http.Request) error {
		if len(via) > maxRedirects {
			return failed(Aborted, "more than %d redirects", maxRedirects)
		}
		if req.URL.Scheme != "http" && req.URL.Scheme != "https" {
			return failed(Denied, "a redirect leads to %s, want http or https", origin(req.URL.String()))
		}
		downgraded := via[len(via)-1].URL.Scheme == "https" && req.URL.Scheme == "http"
		if downgraded && !checked {
			return failed(Denied, "a redirect leads from https to http, and no checksum tells what is to be there")
		}
		if away = away || downgraded || req.URL.Host != via[0].URL.Host; away {
			for name := range own {
				req.Header.Del(name)
			}
			req.Header.Del("Authorization")
			req.Header.Set("User-Agent", userAgent)
		}
		req.Header.Del("Referer") // URLs may be secrets
		return nil
	}
}

// checkAnswer tells whether the answer has the file.
func checkAnswer(resp *http.Response, w *want, maxBytes int64) error {
	switch code := resp.StatusCode; {
	case code == http.StatusOK:
	case code == http.StatusNotFound, code == http.StatusGone:
		return failed(NotFound, "HTTP status %d", code)
	case code == http.StatusUnauthorized, code == http.StatusForbidden, code == http.StatusProxyAuthRequired, code == http.StatusUnavailableForLegalReasons:
		return failed(Denied, "HTTP status %d", code)
	case code == http.StatusTooManyRequests, code == http.StatusServiceUnavailable:
		err := &retryError{err: failed(Busy, "HTTP status %d", code), after: retryAfter(resp.Header.Get("Retry-After"))}
		if err.after > maxRetryAfter {
			return err.err
		}
		return err
	case code >= http.StatusInternalServerError, code == http.StatusRequestTimeout:
		return retry(Aborted, "HTTP status %d", code)
	default:
		return failed(Aborted, "HTTP status %d, want 200", code)
	}
	if resp.ContentLength > maxBytes {
		return failed(TooLarge, "it has %d bytes, at most %d are taken", resp.ContentLength, maxBytes)
	}
	return checkType(resp.Header.Get("Content-Type"), w)
}

// checkType compares what the origin says of the file's type with what is wanted.
// A checksum says more than a type, and many origins do not know types. Archives
// are known by their first bytes.
func checkType(got string, w *want) error {
	if w.resourceType == "" || len(w.sums) > 0 || w.kind == directories {
		return nil
	}
	is, _, err := mime.ParseMediaType(got)
	wanted, _, werr := mime.ParseMediaType(w.resourceType)
	if err != nil || werr != nil || is == "application/octet-stream" || is == "binary/octet-stream" || is == wanted {
		return nil //nolint:nilerr // a type that can't be read says nothing
	}
	return failed(Aborted, "its type is %.100q, want %.100q", is, wanted)
}

// retryAfter reads the header of that name, in seconds; dates are passed over.
func retryAfter(value string) time.Duration {
	n, err := strconv.Atoi(strings.TrimSpace(value))
	if err != nil || n < 0 || n > 1<<20 {
		return 0
	}
	return time.Duration(n) * time.Second
}

// classify makes a FetchError of what a request or reading its answer failed with.
// It leaves out URLs, which http's own errors repeat.
func classify(err error) error {
	if f, ok := errors.AsType[*FetchError](err); ok {
		return &FetchError{Reason: f.Reason, Err: f.Err}
	}
	var dns *net.DNSError
	var op *net.OpError
	var cert *x509.UnknownAuthorityError
	var host *x509.HostnameError
	switch {
	case errors.Is(err, ErrForbidden):
		// Which address it was would tell about the network that is kept from them.
		return failed(Denied, "the host is not on the public Internet, or a redirect leads to one that is not")
	case errors.Is(err, errStalled):
		return retry(Aborted, "%w", errStalled)
	case errors.As(err, &dns):
		if dns.IsNotFound {
			return failed(NotFound, "no such host")
		}
		return retry(Aborted, "the host's name could not be resolved")
	case errors.As(err, &cert), errors.As(err, &host):
		return failed(Aborted, "the origin's certificate: %w", unwrapAll(err))
	case strings.Contains(err.Error(), "Location header"):
		// It is quoted there, and may be a secret as all URLs.
		return failed(Aborted, "a redirect leads to a malformed URL, or to none")
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return retry(Aborted, "the answer broke off")
	case errors.As(err, &op):
		return retry(Aborted, "%s: %w", op.Op, unwrapAll(op.Err))
	}
	return retry(Aborted, "%w", unwrapAll(err))
}

// unwrapAll is what is at the bottom of err.
func unwrapAll(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return fmt.Errorf("%.300s", err.Error()) //nolint:err113 // without the chain, which has the URL
		}
		err = inner
	}
}
