package open

import (
	"strings"
	"testing"
)

// FuzzParse: the URLs of storage are read or refused, and those of two tiers are two
// stores.
func FuzzParse(f *testing.F) {
	f.Add("file:///var/cache/elan?max_size=1GB&min_free=5%25", "gs://bucket/prefix?min_lifetime=3h")
	f.Add("mem://?compress=zstd&max_blob_size=1MB", "file:///x#y")
	f.Add("s3://b?endpoint=http://h", "")
	f.Add("file:///a", "file:///a/")
	f.Add("mem://?max_size=NaN", "gs://b?min_lifetime=-1s")
	f.Fuzz(func(t *testing.T, first, last string) {
		urls := []string{first, last}
		if last == "" {
			urls = urls[:1]
		}
		specs, err := parseAll(urls, Options{})
		if err != nil {
			if !strings.Contains(err.Error(), "storage") {
				t.Errorf("%q: %v, want it to say of what", urls, err)
			}
			return
		}
		for _, s := range specs {
			if s.o.MaxBytes < 0 || s.o.MinFreeBytes < 0 || s.maxBlobBytes < 0 || s.o.MinLifetime < 0 || s.promised <= 0 || s.name == "" {
				t.Errorf("%q is read as %+v", urls, s)
			}
		}
		if len(specs) == 2 && specs[0].name == specs[1].name {
			t.Errorf("%q are both called %s", urls, specs[0].name)
		}
	})
}
