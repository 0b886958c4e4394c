package digest_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/elan/digest"
)

func TestSpace(t *testing.T) {
	a, b := digest.SpaceOf("a"), digest.SpaceOf("b")
	if a == b || a != digest.SpaceOf("a") || a.IsZero() || digest.SpaceOf("").IsZero() || !(digest.Space{}).IsZero() {
		t.Fatalf("spaces %v and %v", a, b)
	}
	for _, fn := range digest.Functions() {
		plain := digest.Of(fn, []byte("abc"))
		d := plain.In(a)
		if d == plain || d == plain.In(b) || d != plain.In(b).In(a) || d.Plain() != plain || d.Space() != a || !plain.Space().IsZero() {
			t.Errorf("%s in a space is %s", plain, d)
		}
		if d.Hash() != plain.Hash() || d.Size() != 3 || d.Function() != fn || d.Proto().Hash != plain.Hash() || d.IsZero() || d.IsEmpty() {
			t.Errorf("%s: hash %s, size %d", d, d.Hash(), d.Size())
		}
		if want := plain.String() + "@" + a.String(); d.String() != want {
			t.Errorf("%s, want %s", d, want)
		}
		if again, err := digest.Parse(d.String()); err != nil || again != d {
			t.Errorf("parse %s: %s, %v", d, again, err)
		}
		if e := digest.Empty(fn); e.In(a) != e {
			t.Errorf("the empty blob in a space is %s", e.In(a))
		}
		if again, err := digest.ParseSpace(a.String()); err != nil || again != a {
			t.Errorf("parse space %s: %s, %v", a, again, err)
		}
	}
	var zero digest.Digest
	if zero.In(a) != zero || zero.Plain() != zero || !zero.Space().IsZero() || zero.Hash() != "" {
		t.Error("the zero Digest is in a space")
	}
}

func TestParse_refusesSpaces(t *testing.T) {
	tag := digest.SpaceOf("a").String()
	for _, s := range []string{
		abcSHA256 + "/3@", abcSHA256 + "/3@" + tag[1:], abcSHA256 + "/3@" + tag + "0", abcSHA256 + "/3@" + strings.ToUpper(tag),
		abcSHA256 + "/3@" + tag + "@" + tag, "@" + tag, abcSHA256 + "@" + tag + "/3", digest.Empty(digest.SHA256).String() + "@" + tag,
		abcSHA256 + "/3@../" + tag[3:],
	} {
		if d, err := digest.Parse(s); !errors.Is(err, digest.ErrInvalid) || !d.IsZero() {
			t.Errorf("parse %q: %s, %v; want ErrInvalid", s, d, err)
		}
	}
}
