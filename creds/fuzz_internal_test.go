package creds

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/mettle-build/mettle/creds/credstest"
)

// signer makes a key of an issuer, and its key set.
func signer(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	return key, set
}

// FuzzKeys: a key set is read or refused, and what is read has public keys
// that bear being used.
func FuzzKeys(f *testing.F) {
	key, set := signer(f)
	private, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key, KeyID: "k"}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(set)
	f.Add(private)
	f.Add([]byte(`{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"},{"kty":"OKP","crv":"Ed25519","x":""}]}`))
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		keys, err := parseKeys(data)
		if (keys == nil) == (err == nil) {
			t.Fatalf("keys %v with error %v", keys, err)
		}
		if err != nil {
			return
		}
		for _, alg := range []string{"ES256", "RS256", "EdDSA", "PS512"} {
			forged := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"alg":%q}`, alg)) + ".e30.AAAA"
			if _, err := keys.VerifySignature(t.Context(), forged); err == nil {
				t.Errorf("%s is taken for signed", forged)
			}
		}
	})
}

// FuzzKeysAt: an issuer is believed where its keys are if it names itself, and then only
// at an address at which nobody else can answer.
func FuzzKeysAt(f *testing.F) {
	f.Add([]byte(`{"issuer":"https://issuer","jwks_uri":"https://issuer/keys"}`))
	f.Add([]byte(`{"issuer":"https://issuer","jwks_uri":"http://127.0.0.1/keys"}`))
	f.Add([]byte(`{"issuer":"https://other","jwks_uri":"https://other/keys"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		at, err := keysAt("https://issuer", data)
		if (at == "") == (err == nil) || err == nil && !strings.HasPrefix(at, "https://") {
			t.Fatalf("%q with error %v", at, err)
		}
	})
}

// FuzzVerify: whoever has a token can change it as they like, and gets no further by
// that than what the issuer has signed.
func FuzzVerify(f *testing.F) {
	key, set := signer(f)
	dir := f.TempDir()
	credstest.Write(f, dir, "keys", string(set))
	p, err := parsePolicy([]byte(`
issuers: [{issuer: "https://issuer", audience: [mettle], jwks_file: keys}]
identities: [{name: x, jwt: {issuer: "https://issuer", claims: {sub: ["*"]}}, rights: [admin]}]
`), dir)
	if err != nil {
		f.Fatal(err)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithHeader("kid", "k"))
	if err != nil {
		f.Fatal(err)
	}
	signed := func(claims string) string {
		j, err := s.Sign([]byte(claims))
		if err != nil {
			f.Fatal(err)
		}
		text, err := j.CompactSerialize()
		if err != nil {
			f.Fatal(err)
		}
		return text
	}
	claims := fmt.Sprintf(`{"iss":"https://issuer","aud":"mettle","sub":"me","exp":%d}`, time.Now().Add(24*time.Hour).Unix())
	good := signed(claims)
	if _, _, err := p.verify(f.Context(), good, true); err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(signed(`{"iss":"https://issuer","aud":["other"],"sub":1,"exp":1}`))
	f.Add(strings.Replace(good, ".", "..", 1))
	f.Add("eyJhbGciOiJub25lIn0.eyJpc3MiOiJodHRwczovL2lzc3VlciJ9.")
	f.Add(`{"payload":"e30","protected":"e30","signature":""}`)
	f.Fuzz(func(t *testing.T, token string) {
		id, _, err := p.verify(t.Context(), token, true)
		if (id == nil) == (err == nil) {
			t.Fatalf("identity %v with error %v", id, err)
		}
		if err != nil {
			return
		}
		_, rest, _ := strings.Cut(token, ".")
		payload, _, _ := strings.Cut(rest, ".")
		if got, _ := base64.RawURLEncoding.DecodeString(payload); string(got) != claims {
			t.Errorf("a token with the claims %q is good", got)
		}
	})
}

// FuzzTokens: a file of tokens gives rights to those that are in it, and where one
// could be guessed, to nobody.
func FuzzTokens(f *testing.F) {
	dir := f.TempDir()
	f.Add([]byte("0123456789abcdef\n"))
	f.Add([]byte(" short 0123456789abcdef"))
	f.Add([]byte("0123456789abcdef 0123456789abcdef"))
	f.Add([]byte("\x00\xff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, "tokens"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := parsePolicy([]byte("identities: [{name: x, token_file: tokens, rights: [admin]}]"), dir)
		if err != nil {
			return
		}
		seen := map[string]bool{}
		for token := range strings.FieldsSeq(string(data)) {
			if seen[token] || len(token) < minTokenBytes {
				t.Errorf("token %q is taken", token)
			}
			seen[token] = true
		}
		if len(p.tokens) != len(seen) || len(seen) == 0 {
			t.Errorf("%d tokens of %d are taken", len(p.tokens), len(seen))
		}
	})
}

// FuzzCertificates: PEM files are read or refused.
func FuzzCertificates(f *testing.F) {
	ca := credstest.NewAuthority(f, "ours")
	cert, key := ca.Issue(f.TempDir(), "server", credstest.Server())
	read := func(file string) []byte {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		return data
	}
	f.Add(read(cert), read(key))
	f.Add([]byte(ca.PEM), read(key))
	f.Add(append(read(key), read(cert)...), append(read(cert), read(key)...))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"), []byte{})
	f.Fuzz(func(t *testing.T, cert, key []byte) {
		if pair, err := keyPair(cert, key, "c", "k"); err == nil {
			end, err := chainEnd(pair)
			if pair.PrivateKey == nil || len(pair.Certificate) == 0 || err == nil && end.IsZero() {
				t.Errorf("a pair of %v and %d certificates, until %v, %v", pair.PrivateKey, len(pair.Certificate), end, err)
			}
		}
		p, err := pool(cert, "c")
		if (p == nil) == (err == nil) {
			t.Errorf("authorities %v with error %v", p, err)
		}
		if end, err := latestEnd(cert); (err == nil) == end.IsZero() || err == nil && p == nil {
			t.Errorf("the authorities %v are good until %v, %v", p, end, err)
		}
	})
}
