package creds_test

import (
	"strings"
	"testing"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
)

func TestNew_refuses(t *testing.T) {
	hash := hashOf(ciToken)
	for name, tc := range map[string]struct{ policy, says string }{
		"a right that is none":     {"identities:\n- name: a\n  token_sha256: [" + hash + "]\n  rights: [cas:raed]", `line 4: "cas:raed" is no right`},
		"a field that is none":     {"identities:\n- name: a\n  tokens: [x]", "line 3: field tokens not found"},
		"a limit that is none":     {"limits:\n  calls: 3", "line 2: field calls not found"},
		"a negative limit":         {"limits:\n  concurrent_calls: -3", "line 2: a limit is negative"},
		"a token itself":           {"identities:\n- name: a\n  token_sha256: [secret]\n  rights: [execute]", "line 3: want the SHA-256 of a token"},
		"no rights":                {"identities:\n- name: a\n  token_sha256: [" + hash + "]", "line 2: identity a has no rights"},
		"instances alone":          {"identities:\n- name: a\n  token_sha256: [" + hash + "]\n  instances: [b]", "line 2: there are instances without rights"},
		"no way to show itself":    {"identities:\n- name: a\n  rights: [execute]", "line 2: identity a can't show itself"},
		"a name twice":             {"identities:\n- {name: a, token_sha256: [" + hash + "], rights: [execute]}\n- {name: a, token_sha256: [" + hash + "], rights: [execute]}", "line 3: identity a is there already, on line 2"},
		"a token twice":            {"identities:\n- {name: a, token_sha256: [" + hash + "], rights: [execute]}\n- {name: b, token_sha256: [" + hash + "], rights: [execute]}", "line 3: this token is that of identity a"},
		"no name":                  {"identities:\n- {token_sha256: [" + hash + "], rights: [execute]}", "each has a name"},
		"a * in the middle":        {"identities:\n- {name: a, token_sha256: [" + hash + "], rights: [execute], instances: [a*b]}", "line 2: pattern \"a*b\""},
		"a short token":            {"identities:\n- name: a\n  token_file: short\n  rights: [execute]", "line 3: short has a token of 5 bytes"},
		"a token file without one": {"identities:\n- name: a\n  token_file: empty\n  rights: [execute]", "line 3: empty has no token"},
		"a token file that is not": {"identities:\n- name: a\n  token_file: nowhere\n  rights: [execute]", "line 3: open"},
		"a certificate of anybody": {"identities:\n- name: a\n  certificate: {}\n  rights: [execute]", "line 3: certificate: want common_name, dns or uri"},
		"an unknown issuer":        {"identities:\n- name: a\n  jwt: {issuer: x, claims: {sub: [b]}}\n  rights: [execute]", `line 3: identity a: issuer "x" is not among the issuers`},
		"an issuer without https":  {"issuers:\n- issuer: http://example.com\n  audience: [mettle]", "line 2: issuer http://example.com: want https://"},
		"an issuer for all":        {"issuers:\n- issuer: https://example.com", "line 2: issuer https://example.com has no audience"},
		"keys that are none":       {"issuers:\n- issuer: https://example.com\n  audience: [mettle]\n  jwks_file: short", "line 4: short: not a JSON Web Key Set"},
		"nobody's instances":       {"identities:\n- name: a\n  token_sha256: [" + hash + "]\n  rights: [execute]\n  instances: []", "line 5: instances is empty"},
		"instances left empty":     {"identities:\n- name: a\n  token_sha256: [" + hash + "]\n  rights: [execute]\n  instances:\n", "line 5: instances is empty"},
		"anonymous left empty":     {"anonymous:\nidentities: [{name: a, token_sha256: [" + hash + "], rights: [execute]}]", "line 1: anonymous is empty"},
		"an instance left empty":   {"anonymous: {rights: [execute], instances: [~, a]}", "line 1: there is an empty value"},
		"the name of nobody":       {"identities:\n- {name: anonymous, token_sha256: [" + hash + "], rights: [execute]}", "line 2: the name anonymous"},
		"the name of a subject":    {"identities:\n- {name: 'developers:alice', token_sha256: [" + hash + "], rights: [execute]}", "line 2: the name"},
		"a name of two lines":      {"identities:\n- {name: \"a\\nb\", token_sha256: [" + hash + "], rights: [execute]}", "line 2: the name"},
		"anonymous for others":     {"anonymous: {rights: [execute], acts_for: true}", "line 1: field acts_for not found"},
		"a serial that is none":    {"anonymous: {rights: [execute]}\nrevoked_certificates: [xyz]", "line 2: \"xyz\" is no serial number"},
		"no YAML":                  {"identities:\n  - name: [", "line"},
		"nothing":                  {"", "nobody could call"},
		"limits of nobody":         {"limits: {concurrent_calls: 3}", "nobody could call"},
		"a list":                   {"- a", "line 1"},
		"two documents":            {"limits: {}\n---\nlimits: {}", "several"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			credstest.Write(t, dir, "short", "short")
			credstest.Write(t, dir, "empty", "\n")
			_, err := creds.New(creds.Options{Policy: credstest.Write(t, dir, "policy.yaml", tc.policy)})
			if err == nil || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), "policy.yaml") {
				t.Errorf("got %v, want it to say %q", err, tc.says)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error has the token: %v", err)
			}
		})
	}
	if _, err := creds.New(creds.Options{Policy: "/nowhere/policy.yaml"}); err == nil || !strings.Contains(err.Error(), "/nowhere/policy.yaml") {
		t.Errorf("no file: %v", err)
	}
}

// FuzzPolicy: a policy is read or refused, whatever is in it.
func FuzzPolicy(f *testing.F) {
	f.Add(usual())
	f.Add("issuers: [{issuer: a, audience: [b], jwks_file: c}]\nidentities: [{name: x, jwt: {issuer: a, claims: {sub: [\"*\"]}}, rights: [admin]}]")
	f.Add("a: &a [*a]")
	f.Fuzz(func(t *testing.T, text string) {
		g, err := creds.New(creds.Options{Policy: credstest.Write(t, t.TempDir(), "policy.yaml", text)})
		if (g == nil) == (err == nil) {
			t.Errorf("guard %v with error %v", g, err)
		}
	})
}
