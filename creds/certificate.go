package creds

import (
	"crypto/x509"
	"slices"
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

// ofCertificate joins what all rules give to a certificate. Nil: nothing.
func (p *policy) ofCertificate(c *x509.Certificate) *Identity {
	var id *Identity
	for i := range p.certificates {
		r := &p.certificates[i]
		if !r.meets(c) {
			continue
		}
		if id == nil {
			first := r.id
			if name := certificateName(c); name != first.Name {
				first.Name += ":" + name
			}
			first.grants = slices.Clone(first.grants)
			id = &first
			continue
		}
		id.grants = append(id.grants, r.id.grants...)
	}
	return id
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
