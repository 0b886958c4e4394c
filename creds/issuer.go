package creds

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
)

// issuer makes JSON Web Tokens, whose signatures are checked by its keys: those of
// a file, or those that it publishes.
type issuer struct {
	name     string
	audience []string
	subject  string
	keys     *keys      // of a file
	asked    *published // else; it lasts as long as policies name the issuer
}

// keys are the public keys of a JSON Web Key Set (RFC 7517). They are immutable.
type keys struct{ all []jose.JSONWebKey }

// maxKeys bounds those of one issuer: a token without a key's name is tried with all.
const maxKeys = 64

// maxTries is how many keys are tried before a message is received.
const maxTries = 4

// parseKeys reads a key set. Those that sign nothing are left out, as those of kinds
// that are not known here, as RFC 7517 section 5 has it.
func parseKeys(data []byte) (*keys, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("not a JSON Web Key Set: %w", err)
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("there are %d keys in it, want %d at most", len(set.Keys), maxKeys)
	}
	k := &keys{}
	for _, text := range set.Keys {
		var key jose.JSONWebKey
		err := json.Unmarshal(text, &key)
		switch {
		case errors.Is(err, jose.ErrUnsupportedKeyType):
			continue
		case err != nil:
			return nil, fmt.Errorf("not a JSON Web Key Set: %w", err)
		case !key.IsPublic():
			return nil, fmt.Errorf("key %.100q is no public key: private ones are for the issuer alone", key.KeyID)
		case key.Use == "" || key.Use == "sig":
			k.all = append(k.all, key)
		}
	}
	if len(k.all) == 0 {
		return nil, errors.New("there is no key for signatures in it")
	}
	return k, nil
}

// of are the keys that may have made a signature with this header: a name that two
// keys have tells nothing, nor does one that is left out.
func (k *keys) of(h jose.Header) []jose.JSONWebKey {
	if k == nil {
		return nil
	}
	var found []jose.JSONWebKey
	for _, key := range k.all {
		if (h.KeyID == "" || key.KeyID == "" || key.KeyID == h.KeyID) && (key.Algorithm == "" || key.Algorithm == h.Algorithm) {
			found = append(found, key)
		}
	}
	return found
}

// VerifySignature implements oidc.KeySet for tokens that issuerOf has read.
func (k *keys) VerifySignature(_ context.Context, raw string) ([]byte, error) {
	signed, err := parseToken(raw)
	if err != nil {
		return nil, err
	}
	header := signed.Signatures[0].Header
	for _, key := range k.of(header) {
		if payload, err := signed.Verify(key); err == nil {
			return payload, nil
		}
	}
	return nil, fmt.Errorf("it is signed by none of the issuer's keys (its key has the name %.100q)", header.KeyID)
}

const (
	// askTimeout bounds a call to an issuer.
	askTimeout = 10 * time.Second
	// askAgain is how often an issuer is asked at most, and asksAtOnce how often
	// before that: callers whom nobody knows bring tokens with names of keys that
	// nobody has, and each would be a question.
	askAgain   = 10 * time.Second
	asksAtOnce = 3
	// refreshKeys is how old keys may be: the issuer has withdrawn one meanwhile, say.
	refreshKeys = 5 * time.Minute
	// keepKeys is for how long an issuer that is away is believed what it said last.
	keepKeys = 24 * time.Hour
	// maxDocumentBytes bounds what an issuer answers.
	maxDocumentBytes = 1 << 20
)

// published are the keys of an issuer that is asked for them (OpenID Connect Discovery
// 1.0): when its first token comes, when a token names a key that is not known, and
// from time to time.
type published struct {
	name   string
	client *http.Client
	asks   *rate.Limiter
	asking singleflight.Group
	// inFlight is more than 0 while it is being asked.
	inFlight atomic.Int32

	mu   sync.Mutex // guards what follows
	keys *keys      // nil until the issuer has answered
	at   time.Time  // when it has
	err  error      // what was wrong when it was asked last
}

func newPublished(name string) *published {
	return &published{
		name: name,
		asks: rate.NewLimiter(rate.Every(askAgain), asksAtOnce),
		client: &http.Client{Timeout: askTimeout, CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) > 2 {
				return errors.New("it redirects too often")
			}
			return checkURL(name, r.URL.String())
		}},
	}
}

// checkURL refuses what others could answer in the issuer's place: all but https, and
// for issuers of this machine all but what they are.
func checkURL(issuer, url string) error {
	if strings.HasPrefix(url, "https://") || isLoopbackURL(issuer) && isLoopbackURL(url) {
		return nil
	}
	return fmt.Errorf("it refers to %.200q, want https://", url)
}

// keysFor are the keys for a token with this header. Where ask is not set they are nil
// if the issuer is to be asked for them, or many would have to be tried: other calls of
// the connection wait for that.
func (i *issuer) keysFor(ctx context.Context, h jose.Header, ask bool) (k *keys, err error) {
	if k, err = i.candidates(ctx, h, ask); !ask && len(k.of(h)) > maxTries {
		return nil, nil //nolint:nilnil // see above
	}
	return k, err
}

func (i *issuer) candidates(ctx context.Context, h jose.Header, ask bool) (k *keys, err error) {
	switch {
	case i.asked == nil:
		return i.keys, nil
	case ask:
		k, err = i.asked.to(ctx, h)
	case i.asked.mayAsk():
		if k, err = i.asked.known(); len(k.of(h)) == 0 {
			return nil, nil //nolint:nilnil // it says more when it is asked
		}
	default:
		k, err = i.asked.known()
	}
	if k == nil && err == nil {
		k = &keys{} // none has made the signature
	}
	return k, err
}

// mayAsk reports whether the issuer may say more than is known: it is being asked, or
// could be.
func (p *published) mayAsk() bool { return p.inFlight.Load() > 0 || p.asks.Tokens() >= 1 }

// to are the keys for a token with this header. The error wraps errUnavailable.
func (p *published) to(ctx context.Context, h jose.Header) (*keys, error) {
	if k, _ := p.known(); len(k.of(h)) > 0 {
		return k, nil
	}
	select {
	case <-p.asking.DoChan("", p.askOnce):
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %s: %w", errUnavailable, p.name, ctx.Err())
	}
	return p.known()
}

// askOnce asks unless that was done too often; it is for asking.
func (p *published) askOnce() (any, error) {
	p.inFlight.Add(1)
	defer p.inFlight.Add(-1)
	if p.asks.Allow() {
		p.ask()
	}
	return nil, nil
}

// known are the keys as the issuer has said last. Where there are none the error says
// why, once it was asked.
func (p *published) known() (*keys, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.keys != nil && time.Since(p.at) < keepKeys {
		return p.keys, nil
	}
	p.keys = nil
	return nil, p.err
}

// ask asks the issuer now. What it said before stays where it does not answer.
func (p *published) ask() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*askTimeout)
	defer cancel()
	k, err := p.fetch(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		p.err = fmt.Errorf("%w: %s: %w", errUnavailable, p.name, err)
		return
	}
	p.keys, p.at, p.err = k, time.Now(), nil
}

// refresh asks again where what is known is old, and is waited for by the Guard's Run.
func (p *published) refresh(log *slog.Logger) {
	p.mu.Lock()
	old, before := p.keys != nil && time.Since(p.at) > refreshKeys, p.err
	p.mu.Unlock()
	if !old {
		return
	}
	_, _, _ = p.asking.Do("", p.askOnce)
	p.mu.Lock()
	err := p.err
	p.mu.Unlock()
	if err != nil && before == nil {
		log.Warn("an issuer of tokens can't be asked, its keys of before are taken", "issuer", p.name, "error", err, "for", keepKeys)
	}
}

// fetch finds out where the issuer has its keys, and gets them.
func (p *published) fetch(ctx context.Context) (*keys, error) {
	data, err := p.get(ctx, strings.TrimSuffix(p.name, "/")+"/.well-known/openid-configuration")
	if err != nil {
		return nil, err
	}
	at, err := keysAt(p.name, data)
	if err != nil {
		return nil, err
	}
	if data, err = p.get(ctx, at); err != nil {
		return nil, err
	}
	return parseKeys(data)
}

// keysAt is where the configuration of an issuer says that its keys are.
func keysAt(issuer string, data []byte) (string, error) {
	var found struct {
		Issuer string `json:"issuer"`
		JWKS   string `json:"jwks_uri"`
	}
	if err := json.Unmarshal(data, &found); err != nil {
		return "", fmt.Errorf("its configuration can't be read: %w", err)
	}
	if found.Issuer != issuer {
		return "", fmt.Errorf("its configuration is that of %.200q", found.Issuer)
	}
	if err := checkURL(issuer, found.JWKS); err != nil {
		return "", err
	}
	return found.JWKS, nil
}

func (p *published) get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close() //nolint:errcheck // it was read
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", url, resp.Status)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxDocumentBytes+1))
	if err == nil && len(data) > maxDocumentBytes {
		err = fmt.Errorf("%s answers with more than %d bytes", url, maxDocumentBytes)
	}
	return data, err
}

// keepIssuers goes on with what the issuers of the policy before have said: a file
// that was changed is no reason to ask them, or to do without them.
func (p *policy) keepIssuers(before *policy) {
	for _, i := range p.issuers {
		at := slices.IndexFunc(before.issuers, func(b *issuer) bool { return b.name == i.name })
		if i.asked != nil && at >= 0 && before.issuers[at].asked != nil {
			i.asked = before.issuers[at].asked
		}
	}
}

// errUnavailable: who the caller is can't be told now.
var errUnavailable = errors.New("the issuer of the token can't be asked for its keys")
