package creds

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
)

// jwtRule gives an identity to tokens with certain claims.
type jwtRule struct {
	issuer string
	claims map[string][]string // patterns
	id     Identity
}

// algorithms are those of signatures: no symmetric ones, for which our key would be
// a secret, and never none.
func algorithms() []string {
	return []string{oidc.RS256, oidc.RS384, oidc.RS512, oidc.ES256, oidc.ES384, oidc.ES512, oidc.PS256, oidc.PS384, oidc.PS512, oidc.EdDSA}
}

func (b *policyBuilder) issuer(n *issuerNode) error {
	name := n.Issuer.text
	switch {
	case name == "":
		return errors.New("issuers: each has an issuer, as its tokens name it")
	case slices.ContainsFunc(b.p.issuers, func(i *issuer) bool { return i.name == name }):
		return wrong(n.Issuer.line, "issuer %s is there already", name)
	case len(n.Audience) == 0:
		return wrong(n.Issuer.line, "issuer %s has no audience: want the name of this service in its tokens, or those for other services would do here", name)
	}
	i := &issuer{name: name, subject: n.Subject.text}
	if i.subject == "" {
		i.subject = "sub"
	}
	for _, a := range n.Audience {
		i.audience = append(i.audience, a.text)
	}
	if n.JWKSFile.text == "" {
		if !strings.HasPrefix(name, "https://") && !isLoopbackURL(name) {
			return wrong(n.Issuer.line, "issuer %s: want https://, or a jwks_file", name)
		}
		i.asked = newPublished(name)
		b.p.issuers = append(b.p.issuers, i)
		return nil
	}
	data, err := b.file(n.JWKSFile)
	if err != nil {
		return err
	}
	if i.keys, err = parseKeys(data); err != nil {
		return wrong(n.JWKSFile.line, "%s: %w", n.JWKSFile.text, err)
	}
	b.p.issuers = append(b.p.issuers, i)
	return nil
}

func (b *policyBuilder) jwt(n *identityNode, id Identity) error {
	if n.JWT == nil {
		return nil
	}
	id.Kind = "jwt"
	name := n.JWT.Issuer
	if !slices.ContainsFunc(b.p.issuers, func(i *issuer) bool { return i.name == name.text }) {
		return wrong(max(name.line, n.Name.line), "identity %s: issuer %q is not among the issuers of this file", id.Name, name.text)
	}
	if len(n.JWT.Claims) == 0 {
		return wrong(name.line, "identity %s: want claims, or everybody to whom %s gives tokens would do; say sub: [\"*\"] for that", id.Name, name.text)
	}
	rule := jwtRule{issuer: name.text, claims: map[string][]string{}, id: id}
	for claim, patterns := range n.JWT.Claims {
		if len(patterns) == 0 {
			return wrong(name.line, "identity %s: claim %s has no values", id.Name, claim)
		}
		rule.claims[claim] = texts(patterns)
	}
	b.p.jwts = append(b.p.jwts, rule)
	return nil
}

// verify returns the identity of a token, and when it expires. Where ask is not set no
// issuer is asked, and where one would have to be there is neither an identity nor an
// error.
func (p *policy) verify(ctx context.Context, raw string, ask bool) (*Identity, time.Time, error) {
	name, header, err := issuerOf(raw)
	if err != nil {
		return nil, time.Time{}, err
	}
	at := slices.IndexFunc(p.issuers, func(i *issuer) bool { return i.name == name })
	if at < 0 {
		return nil, time.Time{}, errors.New("the token is of an issuer that is not known here")
	}
	iss := p.issuers[at]
	k, err := iss.keysFor(ctx, header, ask)
	if err != nil || k == nil {
		return nil, time.Time{}, err
	}
	return p.check(ctx, iss, k, raw)
}

// check is verify where the keys are known.
func (p *policy) check(ctx context.Context, iss *issuer, k *keys, raw string) (*Identity, time.Time, error) {
	verifier := oidc.NewVerifier(iss.name, k, &oidc.Config{
		SkipClientIDCheck: true, // see below: there may be several
		// Other clocks are ahead or behind a little.
		Now:                  func() time.Time { return time.Now().Add(-clockSkew) },
		SupportedSigningAlgs: algorithms(),
	})
	token, err := verifier.Verify(ctx, raw)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("the token is not valid: %w", err)
	}
	if !slices.ContainsFunc(token.Audience, func(a string) bool { return slices.Contains(iss.audience, a) }) {
		return nil, time.Time{}, fmt.Errorf("the token is for %.200q, want one for %q", token.Audience, iss.audience)
	}
	claims, err := claimsOf(token)
	if err != nil {
		return nil, time.Time{}, err
	}
	subject, err := iss.subjectOf(claims)
	if err != nil {
		return nil, time.Time{}, err
	}
	id := p.identityOf(iss, subject, claims)
	if id == nil {
		return nil, time.Time{}, fmt.Errorf("nothing is granted to %s of %s", subject, iss.name)
	}
	return id, token.Expiry.Add(clockSkew), nil
}

// claimsOf are the claims of a token, with numbers as they are written: two that
// differ must not become one.
func claimsOf(token *oidc.IDToken) (map[string]any, error) {
	var raw json.RawMessage
	if err := token.Claims(&raw); err != nil {
		return nil, fmt.Errorf("claims of the token: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	claims := map[string]any{}
	if err := dec.Decode(&claims); err != nil {
		return nil, fmt.Errorf("claims of the token: %w", err)
	}
	return claims, nil
}

// maxSubjectBytes is what OpenID Connect allows for a subject.
const maxSubjectBytes = 255

// subjectOf is the name of the caller. It goes into logs and results.
func (i *issuer) subjectOf(claims map[string]any) (string, error) {
	s, ok := text(claims[i.subject])
	switch {
	case !ok || s == "":
		return "", fmt.Errorf("the token has no claim %q, which names the caller", i.subject)
	case len(s) > maxSubjectBytes:
		return "", fmt.Errorf("the claim %q, which names the caller, has %d bytes, want %d at most", i.subject, len(s), maxSubjectBytes)
	case !printable(s):
		return "", fmt.Errorf("the claim %q, which names the caller, has characters that can't be printed: %q", i.subject, s)
	}
	return s, nil
}

// parseToken reads a token in its compact form, of which one signature is part.
func parseToken(raw string) (*jose.JSONWebSignature, error) {
	algs := make([]jose.SignatureAlgorithm, 0, len(algorithms()))
	for _, a := range algorithms() {
		algs = append(algs, jose.SignatureAlgorithm(a))
	}
	signed, err := jose.ParseSignedCompact(raw, algs)
	if err != nil || len(signed.Signatures) != 1 {
		return nil, errors.New("the token is neither one that is known here nor a JSON Web Token")
	}
	return signed, nil
}

// issuerOf reads the issuer that a token names, before anything is known of it, and
// what it says of its key.
func issuerOf(raw string) (string, jose.Header, error) {
	signed, err := parseToken(raw)
	if err != nil {
		return "", jose.Header{}, err
	}
	var claims struct {
		Issuer string `json:"iss"`
	}
	if err := json.Unmarshal(signed.UnsafePayloadWithoutVerification(), &claims); err != nil {
		return "", jose.Header{}, errors.New("the token has no claims")
	}
	return claims.Issuer, signed.Signatures[0].Header, nil
}

// identityOf joins what all rules give to a subject with these claims. Nil: nothing.
func (p *policy) identityOf(iss *issuer, subject string, claims map[string]any) *Identity {
	var id *Identity
	for i := range p.jwts {
		if r := &p.jwts[i]; r.issuer == iss.name && r.meets(claims) {
			id = id.join(&r.id, r.id.Name+":"+subject)
		}
	}
	return id
}

// meets reports whether each claim of the rule has a value that one of its
// patterns allows.
func (r *jwtRule) meets(claims map[string]any) bool {
	for name, patterns := range r.claims {
		if !anyMatches(patterns, claims[name]) {
			return false
		}
	}
	return true
}

func anyMatches(patterns []string, value any) bool {
	values, ok := value.([]any)
	if !ok {
		values = []any{value}
	}
	return slices.ContainsFunc(values, func(v any) bool {
		s, ok := text(v)
		return ok && slices.ContainsFunc(patterns, func(p string) bool { return matches(p, s) })
	})
}

// text is a claim as patterns see it, if it is a string, a number or a boolean.
func text(value any) (string, bool) {
	switch v := value.(type) {
	case string:
		return v, true
	case json.Number:
		return v.String(), true
	case bool:
		return strconv.FormatBool(v), true
	}
	return "", false
}

// verified remembers tokens that were good, by their hashes: a signature takes
// more time to check than most calls take.
type verified struct {
	mu   sync.Mutex
	byID map[[sha256.Size]byte]verifiedToken
}

type verifiedToken struct {
	id    *Identity
	until time.Time
}

const (
	// maxVerified bounds the tokens that are remembered.
	maxVerified = 4096
	// rememberFor is how long: an issuer can't take a token back, but its key.
	rememberFor = 5 * time.Minute
)

func (v *verified) get(hash [sha256.Size]byte, now time.Time) *Identity {
	v.mu.Lock()
	defer v.mu.Unlock()
	t, ok := v.byID[hash]
	if !ok || now.After(t.until) {
		return nil
	}
	return t.id
}

func (v *verified) put(hash [sha256.Size]byte, id *Identity, now, expiry time.Time) {
	until := now.Add(rememberFor)
	if expiry.Before(until) {
		until = expiry
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.byID == nil || len(v.byID) >= maxVerified {
		v.byID = map[[sha256.Size]byte]verifiedToken{}
	}
	v.byID[hash] = verifiedToken{id, until}
}
