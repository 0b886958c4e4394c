package asset

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"
)

// proxy is the HTTP proxy that one run of git has to go through, since git itself
// would resolve names and follow redirects out of our sight. It connects to what
// the guard agrees to, and lets no more bytes through than are allowed. Only who
// knows its password gets anything: it listens on the loopback device, where other
// users of the machine are too.
type proxy struct {
	url       *url.URL // with user and password
	auth      string
	dialer    *net.Dialer
	transport *http.Transport
	idle      time.Duration

	cancel  context.CancelFunc // ends what handlers wait for
	server  *http.Server
	serving sync.WaitGroup // the server, and tunnels, which it forgets
	left    atomic.Int64   // bytes that git may still get
	refused atomic.Bool    // the guard said no
	over    atomic.Bool    // there were more bytes than allowed
}

// startProxy returns a proxy that serves until it is closed.
func startProxy(ctx context.Context, o Options, g *Guard) (*proxy, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("proxy for git: %w", err)
	}
	user := url.UserPassword("git", rand.Text())
	p := &proxy{
		url:    &url.URL{Scheme: "http", Host: l.Addr().String(), User: user},
		auth:   "Basic " + base64.StdEncoding.EncodeToString([]byte(user.String())),
		dialer: &net.Dialer{Timeout: o.ConnectTimeout, ControlContext: g.Control},
		idle:   o.IdleTimeout,
	}
	ctx, p.cancel = context.WithCancel(ctx)
	p.left.Store(o.MaxBytes)
	p.transport = newTransport(o, g)
	p.server = &http.Server{
		Handler:           p,
		ReadHeaderTimeout: o.ConnectTimeout,
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	p.serving.Go(func() {
		// It ends by close alone, and what fails until then, git tells.
		_ = p.server.Serve(l)
	})
	return p, nil
}

// closeGrace is how long handlers may take to notice their end.
const closeGrace = 2 * time.Second

// close ends all connections, and waits for that. Git has ended by then.
func (p *proxy) close(ctx context.Context) {
	p.cancel()
	// Also where the fetch was cancelled.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeGrace)
	defer cancel()
	// Errors are of connections that somebody else holds open.
	if p.server.Shutdown(ctx) != nil {
		_ = p.server.Close()
	}
	p.serving.Wait()
	p.transport.CloseIdleConnections()
}

// ServeHTTP implements http.Handler.
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if subtle.ConstantTimeCompare([]byte(r.Header.Get("Proxy-Authorization")), []byte(p.auth)) != 1 {
		w.Header().Set("Proxy-Authenticate", `Basic realm="git"`)
		http.Error(w, "this proxy is for one process", http.StatusProxyAuthRequired)
		return
	}
	if r.Method == http.MethodConnect {
		p.tunnel(w, r)
		return
	}
	p.forward(w, r)
}

// refuse answers for what could not be reached.
func (p *proxy) refuse(w http.ResponseWriter, err error) {
	if errors.Is(err, ErrForbidden) {
		p.refused.Store(true)
		http.Error(w, "the host is not on the public Internet", http.StatusForbidden)
		return
	}
	http.Error(w, "the host can't be reached", http.StatusBadGateway)
}

// forward passes on a request by plain http.
func (p *proxy) forward(w http.ResponseWriter, r *http.Request) {
	if r.URL.Scheme != "http" || r.URL.Host == "" {
		http.Error(w, "want an http URL", http.StatusBadRequest)
		return
	}
	out := r.Clone(r.Context())
	out.RequestURI = ""
	for _, h := range []string{"Proxy-Authorization", "Proxy-Connection", "Connection", "Keep-Alive", "Te", "Trailer", "Upgrade"} {
		out.Header.Del(h)
	}
	resp, err := p.transport.RoundTrip(out)
	if err != nil {
		p.refuse(w, err)
		return
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end, or given up
	for name, values := range resp.Header {
		if name != "Connection" && name != "Keep-Alive" {
			w.Header()[name] = values
		}
	}
	w.WriteHeader(resp.StatusCode)
	// Git notices an answer that breaks off.
	_, _ = io.Copy(flushed{w}, p.bounded(resp.Body))
}

// flushed sends on at once what is written to it.
type flushed struct{ w http.ResponseWriter }

// Write implements io.Writer.
func (f flushed) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	if fl, ok := f.w.(http.Flusher); ok && err == nil {
		fl.Flush()
	}
	return n, err
}

// tunnel connects git with the host that it names, and lets them speak by TLS.
func (p *proxy) tunnel(w http.ResponseWriter, r *http.Request) {
	far, err := p.dialer.DialContext(r.Context(), "tcp", r.Host)
	if err != nil {
		p.refuse(w, err)
		return
	}
	defer far.Close() //nolint:errcheck // nothing is buffered in it
	hijacker, ok := w.(http.Hijacker)
	if !ok {
		http.Error(w, "want HTTP/1.1", http.StatusBadRequest)
		return
	}
	p.serving.Add(1) // the server waits for this handler until the next line
	defer p.serving.Done()
	near, buffered, err := hijacker.Hijack()
	if err != nil {
		return
	}
	defer near.Close() //nolint:errcheck // as far
	// The end of the fetch ends both ways at once.
	stop := context.AfterFunc(r.Context(), func() { _ = near.Close(); _ = far.Close() })
	defer stop()
	if _, err := io.WriteString(near, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	var ways sync.WaitGroup
	pass := func(to net.Conn, from io.Reader, conn net.Conn) {
		_, _ = io.Copy(to, idleReader{from, conn, p.idle})
		// The other way has nothing more to say to somebody who is gone.
		_ = near.Close()
		_ = far.Close()
	}
	ways.Go(func() { pass(far, buffered, near) })
	ways.Go(func() { pass(near, p.bounded(far), far) })
	ways.Wait()
}

// idleReader reads from conn, through r, and waits only so long for it.
type idleReader struct {
	r    io.Reader
	conn net.Conn
	idle time.Duration
}

// Read implements io.Reader.
func (i idleReader) Read(b []byte) (int, error) {
	if err := i.conn.SetReadDeadline(time.Now().Add(i.idle)); err != nil {
		return 0, err
	}
	return i.r.Read(b)
}

// bounded counts what comes from r against what git may get.
func (p *proxy) bounded(r io.Reader) io.Reader { return budget{p, r} }

type budget struct {
	p *proxy
	r io.Reader
}

// Read implements io.Reader.
func (b budget) Read(buf []byte) (int, error) {
	n, err := b.r.Read(buf)
	if b.p.left.Add(-int64(n)) < 0 {
		b.p.over.Store(true)
		return 0, errors.New("more bytes than are taken")
	}
	return n, err
}
