package s3

import (
	"net/url"
	"testing"
)

// FuzzParseURL: a URL is read or refused.
func FuzzParseURL(f *testing.F) {
	f.Add("s3://bucket/prefix?region=eu&endpoint=http://localhost:9000&path_style=true")
	f.Add("s3://bucket?path_style=maybe&min_lifetime=1h")
	f.Add("s3:///?x")
	f.Fuzz(func(t *testing.T, text string) {
		u, err := url.Parse(text)
		if err != nil {
			return
		}
		if o, err := ParseURL(u); err == nil && o.Bucket != u.Host {
			t.Errorf("bucket %q of %q", o.Bucket, text)
		}
	})
}

// FuzzHeaders: what a server says of an object is right or refused.
func FuzzHeaders(f *testing.F) {
	f.Add("bytes 5-9/10", int64(5), "AAAAAA==")
	f.Add("bytes 0-/-1", int64(0), "")
	f.Add("bytes 0-0/*", int64(0), "AAAAAAA=")
	f.Add("", int64(-1), "%")
	f.Fuzz(func(t *testing.T, contentRange string, offset int64, sum string) {
		if size, err := totalOf(contentRange, offset); err == nil && size < 0 {
			t.Errorf("an object of %d bytes by %q", size, contentRange)
		}
		if got := decodeCRC32C(&sum); got != nil {
			if again := decodeCRC32C(encodeCRC32C(*got)); again == nil || *again != *got {
				t.Errorf("%q is read as %x, and that as %v", sum, *got, again)
			}
		}
	})
}
