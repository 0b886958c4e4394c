package creds

import (
	"crypto/x509"
	"fmt"
	"slices"
	"time"
)

// certificateRule gives an identity to client certificates, which TLS has verified.
type certificateRule struct {
	commonName, dns, uri string // patterns; "" asks for nothing
	id                   Identity
}

func (r *certificateRule) meets(c *x509.Certificate) bool {
	if r.commonName != "" && !matches(r.commonName, c.Subject.CommonName) {
		return false
	}
	if r.dns != "" && !slices.ContainsFunc(c.DNSNames, func(n string) bool { return matches(r.dns, n) }) {
		return false
	}
	if r.uri == "" {
		return true
	}
	for _, u := range c.URIs {
		if matches(r.uri, u.String()) {
			return true
		}
	}
	return false
}

// stillGood looks at what may have changed since the connection was made, which may
// have been days ago: one of the chains that TLS has verified is to be good as a whole.
func (p *policy) stillGood(chains [][]*x509.Certificate, now time.Time) error {
	var first error
	for _, chain := range chains {
		err := p.goodChain(chain, now)
		if err == nil {
			return nil
		}
		if first == nil {
			first = err
		}
	}
	return first
}

func (p *policy) goodChain(chain []*x509.Certificate, now time.Time) error {
	of := ""
	for _, c := range chain {
		if now.After(c.NotAfter) {
			return fmt.Errorf("the client certificate of %.200q%s has expired: connect with a new one", certificateName(chain[0]), of)
		}
		if len(p.revoked) > 0 && p.revoked[c.SerialNumber.Text(16)] {
			return fmt.Errorf("the client certificate of %.200q%s is revoked in the policy of this server", certificateName(chain[0]), of)
		}
		of = " is of an authority whose certificate"
	}
	return nil
}

// ofCertificate joins what all rules give to a certificate. Nil: nothing.
func (p *policy) ofCertificate(c *x509.Certificate) *Identity {
	var id *Identity
	for i := range p.certificates {
		r := &p.certificates[i]
		if !r.meets(c) {
			continue
		}
		name := r.id.Name
		if subject := certificateName(c); subject != name {
			name += ":" + subject
		}
		id = id.join(&r.id, name)
	}
	return id
}

// checkCertificateName sees to it that the name can stand in logs and results, and
// goes as a whole with calls that are made for its owner.
func checkCertificateName(name string) error {
	if most := MaxForBytes - maxNameBytes - 1; len(name) > most || !printable(name) {
		return fmt.Errorf("the client certificate has the name %.200q: want %d bytes at most that can be printed", name, most)
	}
	return nil
}

// certificateName is what people know a certificate by.
func certificateName(c *x509.Certificate) string {
	switch {
	case len(c.URIs) > 0:
		return c.URIs[0].String()
	case c.Subject.CommonName != "":
		return c.Subject.CommonName
	case len(c.DNSNames) > 0:
		return c.DNSNames[0]
	}
	return c.SerialNumber.String()
}
