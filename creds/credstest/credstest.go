// Package credstest makes certificates for tests: authorities of an hour, and what
// they sign. Nothing of it is for programs.
package credstest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// Write writes a file in one step, as those do it who replace a file that is read
// meanwhile, and returns its path.
func Write(t testing.TB, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

// Authority signs certificates. It is used by one goroutine.
type Authority struct {
	t   testing.TB
	key *ecdsa.PrivateKey
	crt *x509.Certificate
	n   int64
	// PEM is its own certificate.
	PEM string
}

// NewAuthority makes one.
func NewAuthority(t testing.TB, name string) *Authority {
	t.Helper()
	return NewAuthorityUntil(t, name, time.Time{})
}

// NewAuthorityUntil makes one that is good until then; the zero time is in an hour.
func NewAuthorityUntil(t testing.TB, name string, until time.Time) *Authority {
	t.Helper()
	a := &Authority{t: t}
	a.crt, a.key, a.PEM = a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotAfter: until,
	})
	return a
}

// Under makes an authority whose certificate is signed by a. Certificates that it issues
// are good where its PEM follows them.
func (a *Authority) Under(name string) *Authority {
	a.t.Helper()
	b := &Authority{t: a.t, n: 100 * a.n}
	b.crt, b.key, b.PEM = a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return b
}

func (a *Authority) sign(c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, string) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.n++
	c.SerialNumber = big.NewInt(a.n)
	c.NotBefore = time.Now().Add(-time.Hour)
	if c.NotAfter.IsZero() {
		c.NotAfter = time.Now().Add(time.Hour)
	}
	parent, signer := a.crt, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return made, key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// Issue signs a certificate with a new key, writes both to dir, as name.pem and
// name.key, and returns their paths.
func (a *Authority) Issue(dir, name string, c *x509.Certificate) (cert, key string) {
	a.t.Helper()
	_, private, text := a.sign(c)
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		a.t.Fatal(err)
	}
	return Write(a.t, dir, name+".pem", text), Write(a.t, dir, name+".key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
}

// Serial is the serial number of what was issued last, in hexadecimal digits.
func (a *Authority) Serial() string { return strconv.FormatInt(a.n, 16) }

// Server is the certificate of a server on this machine.
func Server() *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: "server"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
}

// Client is the certificate of a client.
func Client(name string) *x509.Certificate {
	return &x509.Certificate{Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
}
