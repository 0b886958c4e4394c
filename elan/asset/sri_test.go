package asset_test

import (
	"crypto/sha1" //nolint:gosec // clients send it
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/zeebo/blake3"

	"github.com/mettle-build/mettle/elan/asset"
)

func TestParseSRI(t *testing.T) {
	data := []byte("hello")
	s1, s256, s384, s512, b3 := sha1.Sum(data), sha256.Sum256(data), sha512.Sum384(data), sha512.Sum512(data), blake3.Sum256(data) //nolint:gosec // as above
	std := base64.StdEncoding.EncodeToString
	sha := "sha256-" + std(s256[:])
	for _, tc := range []struct{ name, in, want string }{
		{"sha256", sha, sha},
		{"sha384", "sha384-" + std(s384[:]), "sha384-" + std(s384[:])},
		{"sha512", "sha512-" + std(s512[:]), "sha512-" + std(s512[:])},
		{"blake3", "blake3-" + std(b3[:]), "blake3-" + std(b3[:])},
		{"sha1 alone", "sha1-" + std(s1[:]), "sha1-" + std(s1[:])},
		{"sha1 beside a better one", "sha1-" + std(s1[:]) + " " + sha, sha},
		{"no padding", strings.TrimRight(sha, "="), sha},
		{"for URLs", "sha512-" + base64.URLEncoding.EncodeToString(s512[:]), "sha512-" + std(s512[:])},
		{"for URLs, no padding", "sha512-" + base64.RawURLEncoding.EncodeToString(s512[:]), "sha512-" + std(s512[:])},
		{"hexadecimal", "sha256-" + hex.EncodeToString(s256[:]), sha},
		{"upper case hexadecimal", "sha256-" + strings.ToUpper(hex.EncodeToString(s256[:])), sha},
		{"options", sha + "?ct=text/plain", sha},
		{"white space", "\t " + sha + "\n", sha},
		{"several, sorted, each once", "sha512-" + std(s512[:]) + "  " + sha + " " + sha, sha + " sha512-" + std(s512[:])},
		{"an algorithm of the future", "sha999-AAAA " + sha, sha},
		{"none", "", ""},
		{"white space alone", "  ", ""},
		{"only the future", "sha999-AAAA", ""},
		{"md5", "md5-XUFAKrxLKna5cZ2REBfFkg==", ""},
		{"no dash", "sha256", ""},
		{"no hash", "sha256-", ""},
		{"no algorithm", "-" + std(s256[:]), ""},
		{"short", sha[:len(sha)-3], ""},
		{"the hash of another algorithm", "sha256-" + std(s512[:]), ""},
		{"rubbish", "sha256-" + strings.Repeat("!", 44), ""},
		{"bits that are not there", "sha256-" + strings.Repeat("A", 42) + "B=", ""},
		{"one is broken", sha + " sha256-x", ""},
		{"too many", strings.Repeat(sha+" ", 65), ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := asset.ParseSRI(tc.in)
			if got != tc.want || (err == nil) != (tc.want != "") || (err != nil && !errors.Is(err, asset.ErrInvalid)) {
				t.Errorf("%q, %v; want %q", got, err, tc.want)
			}
		})
	}
}

func FuzzParseSRI(f *testing.F) {
	for _, s := range []string{sri("x"), strings.TrimRight(sri("x"), "="), "sha1-" + strings.Repeat("a", 40), sri("x") + " " + sri("y"), "sha512-", "a-b?c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := asset.ParseSRI(s)
		if err != nil {
			if !errors.Is(err, asset.ErrInvalid) || len(err.Error()) > 2000 {
				t.Errorf("%q: %v", s, err)
			}
			return
		}
		if again, err := asset.ParseSRI(got); err != nil || again != got {
			t.Errorf("%q gives %q, which gives %q, %v", s, got, again, err)
		}
	})
}

func TestQualifiers(t *testing.T) {
	http2 := []string{"https://a/", "https://b/"}
	for _, tc := range []struct {
		name        string
		dir         bool
		uris        []string
		pairs       []string
		unsupported []string // want these
		invalid     string   // want these words
	}{
		{name: "none"},
		{name: "all of a blob", pairs: []string{
			"checksum.sri", sri("x"), "resource_type", "application/zip", "bazel.canonical_id", "x", "bazel.auth_headers", `{"https://a/":{"A":"b"}}`,
			"http_header:Accept", "a, b", "http_header_url:1:X-Y", "z",
		}},
		{name: "all of git", dir: true, pairs: []string{"resource_type", "application/x-git", "vcs.branch", "feature/x#1", "vcs.commit", "v1.0", "directory", "a/b"}},
		{name: "all of an archive", dir: true, pairs: []string{"checksum.sri", sri("x"), "directory", "a"}},
		{name: "the root", dir: true, pairs: []string{"directory", "."}},
		{name: "unknown", pairs: []string{"zzz", "", "aaa", "1", "checksum.sri", sri("x")}, unsupported: []string{"aaa", "zzz"}},
		{name: "of directories", pairs: []string{"vcs.branch", "x", "vcs.commit", "y", "directory", "z"}, unsupported: []string{"directory", "vcs.branch", "vcs.commit"}},
		{name: "a repository as a file", pairs: []string{"resource_type", "application/x-git"}, unsupported: []string{"resource_type"}},
		{name: "a checksum of a repository", dir: true, pairs: []string{"vcs.branch", "x", "checksum.sri", sri("x")}, unsupported: []string{"checksum.sri"}},
		{
			name:        "headers that are ours",
			pairs:       []string{"http_header:Range", "bytes=0-1", "http_header:host", "h", "http_header_url:0:If-None-Match", "x", "http_header:A b", "x", "http_header:X", "a\r\nb"},
			unsupported: []string{"http_header:A b", "http_header:Range", "http_header:X", "http_header:host", "http_header_url:0:If-None-Match"},
		},
		{name: "the same in JSON", pairs: []string{"bazel.auth_headers", `{"x":{"Range":"bytes=0-1"}}`}, unsupported: []string{"bazel.auth_headers"}},
		{name: "no JSON", pairs: []string{"bazel.auth_headers", `[]`}, invalid: "JSON"},
		{name: "twice", pairs: []string{"checksum.sri", sri("x"), "checksum.sri", sri("y")}, invalid: "twice"},
		{name: "two values of a header", pairs: []string{"http_header_url:0:A", "x", "http_header_url:0:A", "y"}},
		{name: "no name", pairs: []string{"", "x"}, invalid: "no name"},
		{name: "a bad checksum", pairs: []string{"checksum.sri", "x"}, invalid: "checksum.sri"},
		{name: "no such URI", pairs: []string{"http_header_url:2:A", "x"}, invalid: "below the number"},
		{name: "no index", pairs: []string{"http_header_url:A", "x"}, invalid: "below the number"},
		{name: "a negative index", pairs: []string{"http_header_url:-1:A", "x"}, invalid: "below the number"},
		{name: "upwards", dir: true, pairs: []string{"directory", "../x"}, invalid: "directory"},
		{name: "upwards within", dir: true, pairs: []string{"directory", "a/../../x"}, invalid: "directory"},
		{name: "absolute", dir: true, pairs: []string{"directory", "/x"}, invalid: "directory"},
		{name: "a slash at the end", dir: true, pairs: []string{"directory", "x/"}, invalid: "directory"},
		{name: "an option", dir: true, pairs: []string{"vcs.commit", "--upload-pack=x"}, invalid: "vcs.commit"},
		{name: "a refspec", dir: true, pairs: []string{"vcs.branch", "a:b"}, invalid: "vcs.branch"},
		{name: "a forced refspec", dir: true, pairs: []string{"vcs.commit", "+a"}, invalid: "vcs.commit"},
		{name: "an expression", dir: true, pairs: []string{"vcs.commit", "HEAD~1"}, invalid: "vcs.commit"},
		{name: "another expression", dir: true, pairs: []string{"vcs.commit", "a@{1}"}, invalid: "vcs.commit"},
		{name: "a range", dir: true, pairs: []string{"vcs.commit", "a..b"}, invalid: "vcs.commit"},
		{name: "an empty branch", dir: true, pairs: []string{"vcs.branch", ""}, invalid: "vcs.branch"},
		{name: "too much", pairs: []string{"x", strings.Repeat("x", 64<<10)}, invalid: "more than"},
		{name: "no URI", uris: []string{}, invalid: "0 URIs"},
		{name: "an empty URI", uris: []string{""}, invalid: "URI"},
		{name: "a long URI", uris: []string{"https://" + strings.Repeat("x", 9000)}, invalid: "URI"},
		{name: "many URIs", uris: strings.Split(strings.Repeat("https://x/ ", 101), " "), invalid: "URIs"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			uris := tc.uris
			if uris == nil {
				uris = http2
			}
			err := asset.CheckQualifiers(tc.dir, uris, qualifiers(tc.pairs...))
			u, ok := errors.AsType[*asset.UnsupportedError](err)
			switch {
			case tc.unsupported != nil:
				if !ok || strings.Join(u.Names, " ") != strings.Join(tc.unsupported, " ") || !errors.Is(err, asset.ErrInvalid) {
					t.Errorf("%v, want %q unsupported", err, tc.unsupported)
				}
			case tc.invalid != "":
				if ok || !errors.Is(err, asset.ErrInvalid) || !strings.Contains(err.Error(), tc.invalid) {
					t.Errorf("%v, want ErrInvalid and %q", err, tc.invalid)
				}
			case err != nil:
				t.Error(err)
			}
		})
	}
}

func FuzzQualifiers(f *testing.F) {
	f.Add(false, "https://a/", "http_header_url:0:X", "y", "bazel.auth_headers", `{"a":{"b":"c"}}`)
	f.Add(true, "https://a/b.git", "vcs.commit", "abc", "directory", "a/b")
	f.Add(true, "https://user:pw@[::1]:99/%zz", "checksum.sri", "sha256-x", "", "")
	f.Add(false, "urn:x", "resource_type", "application/x-git", "http_header:Range", "1")
	f.Fuzz(func(t *testing.T, dir bool, uri, n1, v1, n2, v2 string) {
		err := asset.CheckQualifiers(dir, []string{uri}, qualifiers(n1, v1, n2, v2))
		if err == nil {
			if !strings.HasPrefix(strings.ToLower(uri), "http") {
				t.Errorf("%q is to be fetched", uri)
			}
			return
		}
		if _, ok := errors.AsType[*asset.FetchError](err); !ok && !errors.Is(err, asset.ErrInvalid) {
			t.Errorf("%v, want ErrInvalid or a FetchError", err)
		}
	})
}

func TestOrigin(t *testing.T) {
	for in, want := range map[string]string{
		"https://host/path?token=secret":  "https://host",
		"https://user:secret@host:1/p":    "https://host:1",
		"https://user:s/ecret@host/":      "an invalid URI",
		"http://host#secret":              "http://host",
		"urn:secret":                      "urn:...",
		"secret":                          "an invalid URI",
		"https://user:secret@ho st/":      "an invalid URI",
		"https://user:secret@[::1]:8/%41": "https://[::1]:8",
	} {
		if got := asset.Origin(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
