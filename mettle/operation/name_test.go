package operation_test

import (
	"errors"
	"math"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/operation"
)

func TestName_roundTrip(t *testing.T) {
	sha := digest.Of(digest.SHA256, []byte("action"))
	for name, n := range map[string]operation.Name{
		"plain":           {Action: sha},
		"instance":        {Action: sha, Instance: "main"},
		"deep instance":   {Action: sha, Instance: "a/b/c"},
		"odd instance":    {Action: sha, Instance: "/a//operations/v1/blobs/ä "},
		"blake3":          {Action: digest.Of(digest.BLAKE3, []byte("action"))},
		"sha1":            {Action: digest.Of(digest.SHA1, []byte("action"))},
		"skip":            {Action: sha, SkipCacheLookup: true},
		"priority":        {Action: sha, Priority: math.MinInt32},
		"both":            {Action: sha, SkipCacheLookup: true, Priority: math.MaxInt32, Instance: "x"},
		"largest":         {Action: digest.Of(digest.SHA512, []byte("action")), Instance: strings.Repeat("x", operation.MaxInstanceBytes), SkipCacheLookup: true, Priority: math.MinInt32},
		"the empty blob":  {Action: digest.Empty(digest.SHA256)},
		"digits in front": {Action: sha, Instance: "12/34"},
	} {
		t.Run(name, func(t *testing.T) {
			n := operation.NewName(n)
			if d := time.Since(n.Created); d < 0 || d > time.Minute {
				t.Errorf("the name is from %v", n.Created)
			}
			s := n.String()
			if !strings.HasPrefix(s, "operations/") {
				t.Errorf("%s does not begin with operations/", s)
			}
			got, err := operation.ParseName(s)
			if err != nil || got != n {
				t.Errorf("ParseName(%s) = %+v, %v, want %+v", s, got, err, n)
			}
			if other := operation.NewName(n); other.String() == s {
				t.Errorf("two names are %s", s)
			}
		})
	}
}

func TestParseName_refuses(t *testing.T) {
	good := operation.NewName(operation.Name{Action: digest.Of(digest.SHA256, []byte("action")), Instance: "main"}).String()
	if _, err := operation.ParseName(good); err != nil {
		t.Fatal(err)
	}
	hash := digest.Of(digest.SHA256, []byte("action")).Hash()
	for name, s := range map[string]string{
		"empty":                  "",
		"foreign":                "operations/8cf2f5a8-cc3b-4b1c-a6c8-7a43d0ee4de6",
		"another version":        strings.Replace(good, "/v1/", "/v2/", 1),
		"cut short":              "operations/v1/a.b/-/sha256/" + hash,
		"no dot":                 "operations/v1/ab/-/sha256/" + hash + "/6",
		"time too large":         "operations/v1/zzzzzzzzzzzzzzzz.b/-/sha256/" + hash + "/6",
		"time to come":           "operations/v1/" + strconv.FormatInt(1<<62, 36) + ".b/-/sha256/" + hash + "/6",
		"time before all":        "operations/v1/-" + strconv.FormatInt(1<<62, 36) + ".b/-/sha256/" + hash + "/6",
		"id no number":           "operations/v1/a.!/-/sha256/" + hash + "/6",
		"upper case":             "operations/v1/A.b/-/sha256/" + hash + "/6",
		"unknown flags":          "operations/v1/a.b/x/sha256/" + hash + "/6",
		"flags in another order": "operations/v1/a.b/p1s/sha256/" + hash + "/6",
		"zero priority":          "operations/v1/a.b/p0/sha256/" + hash + "/6",
		"priority too large":     "operations/v1/a.b/p2147483648/sha256/" + hash + "/6",
		"unknown function":       "operations/v1/a.b/-/md4/" + hash + "/6",
		"hash of another length": "operations/v1/a.b/-/sha1/" + hash + "/6",
		"negative size":          "operations/v1/a.b/-/sha256/" + hash + "/-6",
		"leading zero":           "operations/v1/a.b/-/sha256/" + hash + "/06",
		"slash at the end":       "operations/v1/a.b/-/sha256/" + hash + "/6/",
		"instance too long":      "operations/v1/a.b/-/sha256/" + hash + "/6/" + strings.Repeat("x", operation.MaxInstanceBytes+1),
		"NUL":                    "operations/v1/a.b/-/sha256/" + hash + "/6/a\x00b",
	} {
		t.Run(name, func(t *testing.T) {
			if n, err := operation.ParseName(s); !errors.Is(err, operation.ErrBadName) {
				t.Errorf("ParseName(%q) = %+v, %v, want %v", s, n, err, operation.ErrBadName)
			}
		})
	}
}

func FuzzParseName(f *testing.F) {
	f.Add(operation.NewName(operation.Name{Action: digest.Of(digest.SHA256, nil), Instance: "a/b", Priority: -3}).String())
	f.Add(operation.NewName(operation.Name{Action: digest.Of(digest.BLAKE3, []byte("x")), SkipCacheLookup: true}).String())
	f.Add("operations/v1/0.0/-/sha1/da39a3ee5e6b4b0d3255bfef95601890afd80709/0")
	f.Fuzz(func(t *testing.T, s string) {
		n, err := operation.ParseName(s)
		if err != nil {
			if !errors.Is(err, operation.ErrBadName) {
				t.Errorf("%v does not wrap ErrBadName", err)
			}
			return
		}
		if n.String() != s {
			t.Errorf("ParseName(%q).String() is %q", s, n.String())
		}
	})
}

func BenchmarkName(b *testing.B) {
	n := operation.NewName(operation.Name{Action: digest.Of(digest.SHA256, []byte("action")), Instance: "main"})
	s := n.String()
	b.Run("format", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = operation.NewName(n).String()
		}
	})
	b.Run("parse", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := operation.ParseName(s); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// TestParseName_released: names that clients were given by servers of 0.1.0 mean what
// they meant.
func TestParseName_released(t *testing.T) {
	created := time.UnixMicro(1795355908198049)
	for text, want := range map[string]operation.Name{
		"operations/v1/hoef490wpt.mf9g063v08f/-/sha256/bd938c688f49b77c7fc537c6b9222e2c97ebddd63076b87f2feaec66fb9c05d0/6": {Action: digest.Of(digest.SHA256, []byte("action")), Created: created, Random: 0x0123456789abcdef},
		"operations/v1/hoef490wpt.16/sp-7/blake3/03b58451cab1e89b16ac6ecefe124ec6cf475071aa3375097a96cfc88420b843/6/an/instance": {
			Action: digest.Of(digest.BLAKE3, []byte("action")), Instance: "an/instance", SkipCacheLookup: true, Priority: -7, Created: created, Random: 42,
		},
	} {
		if got, err := operation.ParseName(text); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", text, got, err, want)
		}
	}
}
