// Package buckettest is what every store over a bucket has to do when the bucket
// misbehaves: a proxy in front of a fake server, which breaks its answers in the
// ways of real ones, and a suite (Run) of what the store makes of that and how
// many requests it takes. Only the tests of elan/blob/gcs and elan/blob/s3
// import it.
package buckettest

import (
	"bytes"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
)

// A Fault answers a request in place of the server, which is next.
type Fault func(w http.ResponseWriter, r *http.Request, next http.Handler)

// Status answers with an HTTP status.
func Status(code int) Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		_, _ = io.Copy(io.Discard, r.Body) // as much as comes
		w.WriteHeader(code)
	}
}

// Reset breaks the connection before the request is served.
func Reset(w http.ResponseWriter, _ *http.Request, _ http.Handler) { reset(w) }

// LoseAnswer breaks the connection after the request was served.
func LoseAnswer(w http.ResponseWriter, r *http.Request, next http.Handler) {
	next.ServeHTTP(httptest.NewRecorder(), r)
	reset(w)
}

// Truncate sends the head of the answer and half of its bytes, and breaks the
// connection.
func Truncate(w http.ResponseWriter, r *http.Request, next http.Handler) { cut(w, r, next, 2) }

// TruncateAll sends the head of the answer, and breaks the connection.
func TruncateAll(w http.ResponseWriter, r *http.Request, next http.Handler) { cut(w, r, next, 0) }

func cut(w http.ResponseWriter, r *http.Request, next http.Handler, part int) {
	rec := httptest.NewRecorder()
	next.ServeHTTP(rec, r)
	body := rec.Body.Bytes()
	copyHead(w, rec)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(rec.Code)
	if part > 0 {
		_, _ = w.Write(body[:len(body)/part])
	}
	_ = http.NewResponseController(w).Flush()
	reset(w)
}

// Corrupt changes one byte of the answer.
func Corrupt(w http.ResponseWriter, r *http.Request, next http.Handler) {
	rec := httptest.NewRecorder()
	next.ServeHTTP(rec, r)
	body := rec.Body.Bytes()
	body[len(body)/2] ^= 1
	copyHead(w, rec)
	w.WriteHeader(rec.Code)
	_, _ = w.Write(body)
}

// CorruptRequest changes one byte near the middle of the request's body, which
// belongs to the blob where that is large.
func CorruptRequest(w http.ResponseWriter, r *http.Request, next http.Handler) {
	body, _ := io.ReadAll(r.Body)
	body[len(body)/2] ^= 1
	r.Body = io.NopCloser(bytes.NewReader(body))
	next.ServeHTTP(w, r)
}

// Stall does not answer before the client gives up.
func Stall(_ http.ResponseWriter, r *http.Request, _ http.Handler) {
	_, _ = io.Copy(io.Discard, r.Body) // or the server does not see the client go
	<-r.Context().Done()
}

func copyHead(w http.ResponseWriter, rec *httptest.ResponseRecorder) {
	maps.Copy(w.Header(), rec.Header())
}

func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler) // ends the connection too
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // with a reset
	}
	_ = conn.Close()
}

// Proxy is a server in front of another one, which counts requests by the
// operation that they are, and answers some of them with faults.
type Proxy struct {
	*httptest.Server
	next http.Handler
	op   func(r *http.Request) string

	mu     sync.Mutex
	counts map[string]int
	faults map[string]injected
	now    int // requests being served
	most   int // that were at once
}

type injected struct {
	fault Fault
	times int // negative: for ever
}

// NewProxy starts a Proxy, until the test ends. The operation of a request is
// one of: check, stat, get, list, put, begin, part, end, touch, delete, abort.
func NewProxy(t testing.TB, next http.Handler, op func(r *http.Request) string) *Proxy {
	p := &Proxy{next: next, op: op, counts: map[string]int{}, faults: map[string]injected{}}
	p.Server = httptest.NewServer(p)
	t.Cleanup(p.Close)
	return p
}

// ServeHTTP implements http.Handler.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	op := p.op(r)
	p.mu.Lock()
	p.counts[op]++
	p.now++
	p.most = max(p.most, p.now)
	in, ok := p.faults[op]
	switch {
	case ok && in.times == 0:
		ok = false
	case ok:
		in.times--
		p.faults[op] = in
	}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.now--
		p.mu.Unlock()
	}()
	if ok {
		in.fault(w, r, p.next)
		return
	}
	p.next.ServeHTTP(w, r)
}

// Inject answers the next requests of an operation with f; negative times: all.
func (p *Proxy) Inject(op string, times int, f Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults[op] = injected{fault: f, times: times}
}

// Reset forgets what was counted and injected.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.counts)
	clear(p.faults)
	p.most = 0
}

// Counts returns the number of requests since Reset, by operation.
func (p *Proxy) Counts() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.counts)
}

// Most returns how many requests were served at once since Reset, at the most.
func (p *Proxy) Most() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.most
}
