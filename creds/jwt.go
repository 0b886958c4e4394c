package creds

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"golang.org/x/sync/singleflight"
)

// issuer makes JSON Web Tokens, whose signatures are checked by its keys: those of
// a file, or those that it publishes (OpenID Connect Discovery 1.0).
type issuer struct {
	name     string
	audience []string
	subject  string
	asking   singleflight.Group

	mu    sync.Mutex
	keys  oidc.KeySet // nil until the issuer was asked
	asked time.Time   // when that failed last
	err   error
}

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
		b.p.issuers = append(b.p.issuers, i)
		return nil
	}
	data, err := b.file(n.JWKSFile)
	if err != nil {
		return err
	}
	if i.keys, err = staticKeys(data); err != nil {
		return wrong(n.JWKSFile.line, "%s: %w", n.JWKSFile.text, err)
	}
	b.p.issuers = append(b.p.issuers, i)
	return nil
}

// staticKeys are those of a JSON Web Key Set (RFC 7517).
func staticKeys(data []byte) (oidc.KeySet, error) {
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("not a JSON Web Key Set: %w", err)
	}
	keys := &oidc.StaticKeySet{}
	for _, k := range set.Keys {
		if !k.IsPublic() {
			return nil, fmt.Errorf("key %q is no public key: private ones are for the issuer alone", k.KeyID)
		}
		if k.Use == "" || k.Use == "sig" {
			keys.PublicKeys = append(keys.PublicKeys, k.Key)
		}
	}
	if len(keys.PublicKeys) == 0 {
		return nil, errors.New("there is no key for signatures in it")
	}
	return keys, nil
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

// askAgain is how long an issuer that could not be asked is left alone.
const askAgain = 10 * time.Second

// askTimeout bounds a call to an issuer.
const askTimeout = 10 * time.Second

// keySet is the issuer's keys, which it is asked for once, when its first token
// comes. Later it is asked again for those that it has changed to.
func (i *issuer) keySet(ctx context.Context) (oidc.KeySet, error) {
	if keys, err := i.known(); keys != nil || err != nil {
		return keys, err
	}
	select {
	case r := <-i.asking.DoChan("", func() (any, error) { return nil, i.ask() }): //nolint:contextcheck // what is asked is for all callers
		if r.Err != nil {
			return nil, r.Err
		}
		return i.known()
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %s: %w", errUnavailable, i.name, ctx.Err())
	}
}

// known is what is known of the keys; neither is set where nothing is.
func (i *issuer) known() (oidc.KeySet, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.keys == nil && i.err != nil && time.Since(i.asked) < askAgain {
		return nil, i.err
	}
	return i.keys, nil
}

// ask finds out where the issuer publishes its keys.
func (i *issuer) ask() error {
	keys, err := discover(i.name)
	i.mu.Lock()
	defer i.mu.Unlock()
	i.asked, i.keys, i.err = time.Now(), keys, nil
	if err != nil {
		i.keys, i.err = nil, fmt.Errorf("%w: %s: %w", errUnavailable, i.name, err)
	}
	return i.err
}

func discover(issuer string) (oidc.KeySet, error) {
	// The provider keeps the context, for the calls that it makes later.
	ctx := oidc.ClientContext(context.Background(), &http.Client{Timeout: askTimeout})
	provider, err := oidc.NewProvider(ctx, issuer)
	if err != nil {
		return nil, err
	}
	var found struct {
		JWKS string `json:"jwks_uri"`
	}
	if err := provider.Claims(&found); err != nil {
		return nil, err
	}
	return oidc.NewRemoteKeySet(ctx, found.JWKS), nil
}

// errUnavailable: who the caller is can't be told now.
var errUnavailable = errors.New("the issuer of the token can't be asked for its keys")

// verify returns the identity of a token, and when it expires.
func (p *policy) verify(ctx context.Context, raw string) (*Identity, time.Time, error) {
	name, err := issuerOf(raw)
	if err != nil {
		return nil, time.Time{}, err
	}
	at := slices.IndexFunc(p.issuers, func(i *issuer) bool { return i.name == name })
	if at < 0 {
		return nil, time.Time{}, errors.New("the token is of an issuer that is not known here")
	}
	iss := p.issuers[at]
	keys, err := iss.keySet(ctx)
	if err != nil {
		return nil, time.Time{}, err
	}
	verifier := oidc.NewVerifier(iss.name, keys, &oidc.Config{
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
		return nil, time.Time{}, fmt.Errorf("the token is for %q, want one for %q", token.Audience, iss.audience)
	}
	claims := map[string]any{}
	if err := token.Claims(&claims); err != nil {
		return nil, time.Time{}, fmt.Errorf("claims of the token: %w", err)
	}
	id := p.identityOf(iss, claims)
	if id == nil {
		return nil, time.Time{}, fmt.Errorf("nothing is granted to %s of %s", text(claims[iss.subject]), iss.name)
	}
	return id, token.Expiry.Add(clockSkew), nil
}

// issuerOf reads the issuer that a token names, before anything is known of it.
func issuerOf(raw string) (string, error) {
	algs := make([]jose.SignatureAlgorithm, 0, len(algorithms()))
	for _, a := range algorithms() {
		algs = append(algs, jose.SignatureAlgorithm(a))
	}
	signed, err := jose.ParseSigned(raw, algs)
	if err != nil {
		return "", errors.New("the token is neither one that is known here nor a JSON Web Token")
	}
	var claims struct {
		Issuer string `json:"iss"`
	}
	if err := json.Unmarshal(signed.UnsafePayloadWithoutVerification(), &claims); err != nil {
		return "", errors.New("the token has no claims")
	}
	return claims.Issuer, nil
}

// identityOf joins what all rules give to somebody with these claims. Nil: nothing.
func (p *policy) identityOf(iss *issuer, claims map[string]any) *Identity {
	var id *Identity
	for i := range p.jwts {
		r := &p.jwts[i]
		if r.issuer != iss.name || !r.meets(claims) {
			continue
		}
		if id == nil {
			first := r.id
			first.Name += ":" + text(claims[iss.subject])
			first.grants = slices.Clone(first.grants)
			id = &first
			continue
		}
		id.grants = append(id.grants, r.id.grants...)
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
	switch v := value.(type) {
	case nil:
		return false
	case []any:
		return slices.ContainsFunc(v, func(one any) bool { return anyMatches(patterns, one) })
	}
	s := text(value)
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, s) })
}

// text is a claim as patterns see it: strings, numbers and booleans.
func text(value any) string {
	if s, ok := value.(string); ok {
		return s
	}
	return fmt.Sprint(value)
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
