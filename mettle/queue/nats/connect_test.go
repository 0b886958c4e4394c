package nats_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/nats"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// An authority signs certificates, and writes them to a directory.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir()}
	a.cert, a.key = a.sign(t, "ca", &x509.Certificate{
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

// sign makes NAME.pem and NAME-key.pem. The first one is signed by itself.
func (a *authority) sign(t *testing.T, name string, c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c.SerialNumber, c.Subject = big.NewInt(time.Now().UnixNano()), pkix.Name{CommonName: name}
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, parentKey := a.cert, a.key
	if parent == nil {
		parent, parentKey = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, parentKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name + "-key.pem": {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(a.file(file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c.Raw = der
	return c, key
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

// guard has a server show a certificate of the authority's, and ask for one.
func (a *authority) guard(t *testing.T) func(*server.Options) {
	t.Helper()
	a.sign(t, "server", &x509.Certificate{
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	cert, err := tls.LoadX509KeyPair(a.file("server.pem"), a.file("server-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	data, err := os.ReadFile(a.file("ca.pem"))
	if err != nil || !pool.AppendCertsFromPEM(data) {
		t.Fatalf("the authority's own certificate: %v", err)
	}
	return func(o *server.Options) {
		o.TLSConfig = &tls.Config{
			Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS12,
		}
		o.TLSVerify, o.TLSTimeout = true, 10
	}
}

func client() *x509.Certificate {
	return &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
}

// A broker with TLS, which both sides check by an authority of one's own.
func TestNew_tls(t *testing.T) {
	t.Parallel()
	ours, others := newAuthority(t), newAuthority(t)
	b := newBroker(t, ours.guard(t))
	ours.sign(t, "worker", client())
	others.sign(t, "worker", client())
	address := func(scheme, settings string) string {
		return fmt.Sprintf("%s://127.0.0.1:%d/secure?timeout=2s%s", scheme, b.opts.Port, settings)
	}
	certs := func(a *authority) string {
		return "&cert=" + url.QueryEscape(a.file("worker.pem")) + "&key=" + url.QueryEscape(a.file("worker-key.pem"))
	}
	ca := func(a *authority) string { return "&ca=" + url.QueryEscape(a.file("ca.pem")) }
	for _, tc := range []struct{ name, url, want string }{
		{"all is well", address("tls", ca(ours)+certs(ours)), ""},
		{"nats is tls where there are certificates", address("nats", ca(ours)+certs(ours)), ""},
		{"a server that nobody we know has signed", address("tls", certs(ours)), "certificate"},
		{"a server that another has signed", address("tls", ca(others)+certs(ours)), "certificate"},
		{"a client without a certificate", address("tls", ca(ours)), "tls"},
		{"a client that another has signed", address("tls", ca(ours)+certs(others)), "tls"},
		{"no such file", address("tls", "&ca=/nowhere/ca.pem"), "/nowhere/ca.pem"},
		{"not a certificate", address("tls", "&ca="+url.QueryEscape(ours.file("ca-key.pem"))), "there are none"},
		{"no such key", address("tls", ca(ours)+"&cert="+url.QueryEscape(ours.file("worker.pem"))+"&key=/nowhere/key"), "/nowhere/key"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o, err := nats.ParseURL(tc.url)
			if err != nil {
				t.Fatal(err)
			}
			q, err := nats.New(t.Context(), o)
			if err == nil {
				defer q.Close()
			}
			if strings.HasPrefix(tc.name, "a server") && !errors.Is(err, queue.ErrRefused) {
				t.Errorf("error %v, want %v: no patience helps", err, queue.ErrRefused)
			}
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("error %v, want %q in it", err, tc.want)
			}
			if err == nil {
				mustPublish(t, q, tc.name)
				if err := mustLease(t, q, tc.name, 1).Ack(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// Certificates that were renewed are read for the next connection.
func TestQueue_tlsRenewed(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	b := newBroker(t, a.guard(t))
	expired := client()
	a.sign(t, "worker", expired)
	q := newQueue(t, b, func(o *nats.Options) {
		o.CAFile, o.CertFile, o.KeyFile, o.Timeout = a.file("ca.pem"), a.file("worker.pem"), a.file("worker-key.pem"), patience
	})
	mustPublish(t, q, "a")
	b.stop()
	// The next server trusts another authority, and so do we by then.
	next := newAuthority(t)
	next.guard(t)(&b.opts)
	next.sign(t, "worker", client())
	for _, name := range []string{"ca.pem", "worker.pem", "worker-key.pem"} {
		data, err := os.ReadFile(next.file(name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(a.file(name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b.start(t)
	if err := mustLease(t, q, "a", 1).Ack(t.Context()); err != nil {
		t.Error(err)
	}
}

// The streams are in another domain than that of the server that we talk to.
func TestNew_domain(t *testing.T) {
	t.Parallel()
	hub := newBroker(t, func(o *server.Options) {
		o.ServerName, o.JetStreamDomain = "hub", "hub"
		o.LeafNode.Host, o.LeafNode.Port = "127.0.0.1", server.RANDOM_PORT
	})
	v, err := hub.srv.Varz(nil)
	if err != nil {
		t.Fatal(err)
	}
	leaf := newBroker(t, func(o *server.Options) {
		o.ServerName, o.JetStreamDomain = "leaf", "leaf"
		remote := &url.URL{Scheme: "nats-leaf", Host: fmt.Sprint("127.0.0.1:", v.LeafNode.Port)}
		o.LeafNode.Remotes = []*server.RemoteLeafOpts{{URLs: []*url.URL{remote}}}
	})
	o := nats.Options{Servers: []string{leaf.url()}, Prefix: "far", Domain: "hub", Timeout: patience, LeaseTime: leaseTime}
	q, err := nats.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	updates := receive(t, q)
	mustPublish(t, q, "a")
	l := mustLease(t, q, "a", 1)
	if err := l.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	l = mustLease(t, q, "a", 2)
	if err := l.Ack(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, updates, "a", queuepb.Update_REQUEUED)
	o.Domain, o.MustExist = "leaf", true
	if q, err := nats.New(t.Context(), o); err == nil {
		q.Close()
		t.Error("the streams are in the leaf's own domain")
	}
}
