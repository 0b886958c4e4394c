package bucket

import (
	"net/url"
	"testing"
)

// FuzzParseQuery: the options of a URL are read or refused, and what was not asked
// for is not set.
func FuzzParseQuery(f *testing.F) {
	f.Add("gs://bucket/prefix?min_lifetime=720h&max_reads=7&region=x")
	f.Add("s3://b?expire_after=-1s&touch_every=1&max_requests=99999999999999999999")
	f.Add("gs://u:p@b:1/x#f")
	f.Add("gs://b?a=1&a=2&%zz")
	f.Fuzz(func(t *testing.T, text string) {
		u, err := url.Parse(text)
		if err != nil {
			return
		}
		var o Options
		rest, err := ParseQuery(u, &o)
		if err != nil {
			return
		}
		for _, ours := range []string{"min_lifetime", "expire_after", "touch_every", "max_requests", "max_reads"} {
			if v, ok := rest[ours]; ok {
				t.Errorf("%s=%s is left for others", ours, v)
			}
		}
		_, _ = CleanPrefix(u.Path)
	})
}

// FuzzNames: what a listing names is ours only if we would name it so.
func FuzzNames(f *testing.F) {
	const hash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	f.Add("sha256/" + hash + "-0")
	f.Add("sha256/" + hash + "-0-0123456789abcdef0123456789abcdef")
	f.Add("sha256/" + hash + "-00")
	f.Add("~YWJj")
	f.Add("~~" + hash)
	f.Add("a.b")
	f.Fuzz(func(t *testing.T, name string) {
		// The empty blob is in no space, and looked for in none.
		if d, ok := parseDigest(name); ok && d.Size() > 0 && string(appendDigest(nil, d)) != name {
			t.Errorf("%q is taken for %s, which is named %q", name, d, appendDigest(nil, d))
		}
		if instance, ok := parseInstance(name); ok && len(instance) <= maxEncoded {
			if again, ok := parseInstance(string(appendInstance(nil, instance))); !ok || again != instance {
				t.Errorf("%q is taken for the instance %q, which is named %q", name, instance, appendInstance(nil, instance))
			}
		}
	})
}
