package flags_test

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"runtime"
	"testing"

	"golang.org/x/net/http2"

	"github.com/mettle-build/mettle/creds/credstest"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/elan/rpc"
)

// TestGuarded_idleConnections: what an idle connection with TLS holds, at both of its
// ends, of which the client's is the bare minimum.
func TestGuarded_idleConnections(t *testing.T) {
	const conns, most = 200, 100 << 10
	dir := t.TempDir()
	ca := credstest.NewAuthority(t, "authority")
	trust := flags.Trust{TLSMinVersion: "1.2"}
	trust.TLSCert, trust.TLSKey = ca.Issue(dir, "server", credstest.Server())
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g, err := trust.Guard(flags.GuardOptions{Addr: l.Addr()})
	if err != nil {
		t.Fatal(err)
	}
	srv, _ := rpc.NewServer(g.ServerOptions...)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	config := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "localhost", NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12}
	if !config.RootCAs.AppendCertsFromPEM([]byte(ca.PEM)) {
		t.Fatal("the authority has no certificate")
	}
	settled(t, l.Addr().String(), config) // what there is once, however many come
	before := live()
	for range conns {
		settled(t, l.Addr().String(), config)
	}
	if each := (live() - before) / conns; each > most {
		t.Errorf("an idle connection holds %d KiB, want %d at most", each>>10, most>>10)
	} else {
		t.Logf("an idle connection holds %d KiB, with its client's end", each>>10)
	}
}

// settled is a connection on which the server has taken the client's settings, and
// that stays until the end of the test.
func settled(t *testing.T, addr string, config *tls.Config) {
	t.Helper()
	conn, err := (&tls.Dialer{Config: config}).DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	f := http2.NewFramer(conn, conn)
	if err := f.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if s, ok := frame.(*http2.SettingsFrame); ok && s.IsAck() {
			return
		}
	}
}

// live is what is alive on the heap.
func live() int64 {
	runtime.GC()
	runtime.GC() // what was in a pool goes with the second
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc) //nolint:gosec // no heap is that large
}
