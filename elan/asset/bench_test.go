package asset_test

import (
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/blob/file"
)

// BenchmarkFetchBlob fetches from an origin in this process into the file store:
// each time anew, and what is known.
func BenchmarkFetchBlob(b *testing.B) {
	large := []byte(strings.Repeat("0123456789abcdef", 4<<20))
	o := newSite(b, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/large" {
			// Other bytes each time, or the store would have them.
			_, _ = w.Write([]byte(r.URL.RawQuery))
			_, _ = w.Write(large)
			return
		}
		_, _ = w.Write([]byte(r.URL.String()))
	})
	for _, bc := range []struct {
		name  string
		path  string
		bytes int64
		known bool
	}{
		{"small", "/small", 0, false},
		{"64MiB", "/large", int64(len(large)), false},
		{"known", "/known", 0, true},
	} {
		b.Run(bc.name, func(b *testing.B) {
			dir := b.TempDir()
			s, err := file.New(file.Options{Dir: dir + "/store"})
			if err != nil {
				b.Fatal(err)
			}
			a, err := asset.New(asset.Options{Store: s, Entries: s, Dir: dir + "/assets", AllowPrivate: loopback()})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			b.SetBytes(bc.bytes)
			n := 0
			for b.Loop() {
				if !bc.known {
					n++
				}
				if _, err := a.FetchBlob(b.Context(), request(o.URL+bc.path+"?"+strconv.Itoa(n))); err != nil {
					b.Fatal(err)
				}
			}
			if err := a.Close(); err != nil {
				b.Error(err)
			}
			if err := s.Close(); err != nil {
				b.Error(err)
			}
		})
	}
}
