package open_test

import (
	"strings"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/open"
	"github.com/mettle-build/mettle/elan/digest"
)

func TestOpen(t *testing.T) {
	for name, tc := range map[string]struct{ url, wantErr string }{
		"file":                       {url: "file://" + t.TempDir()},
		"mem":                        {url: "mem://"},
		"relative file":              {url: "file://some/dir", wantErr: "three slashes"},
		"mem with a path":            {url: "mem:///x", wantErr: "just mem://"},
		"bucket without a name":      {url: "gs:///x", wantErr: "name of a bucket"},
		"bucket with a password":     {url: "s3://id:secret@b/x", wantErr: "BUCKET/PREFIX"},
		"bucket's unknown option":    {url: "gs://b/x?region=here", wantErr: "option region"},
		"bucket's wrong option":      {url: "s3://b/x?expire_after=soon", wantErr: "option expire_after"},
		"bucket's impossible option": {url: "s3://b/x?expire_after=2h", wantErr: "expiry"},
		"bucket's strange prefix":    {url: "gs://b/x/../y", wantErr: "prefix"},
		"mem with a size":            {url: "mem://?max_size=1MiB"},
		"file with options":          {url: "file://" + t.TempDir() + "?max_size=100MB&min_free=1B&min_lifetime=1h"},
		"mem compressed":             {url: "mem://?compress=zstd"},
		"file compressed":            {url: "file://" + t.TempDir() + "?compress=zstd", wantErr: "does not apply"},
		"unknown compressor":         {url: "mem://?compress=lz4", wantErr: "neither zstd nor none"},
		"unknown option":             {url: "mem://?size=1GB", wantErr: "option size is unknown"},
		"wrong size":                 {url: "mem://?max_size=much", wantErr: "option max_size"},
		"wrong lifetime":             {url: "mem://?min_lifetime=-1h", wantErr: "option min_lifetime"},
		"option twice":               {url: "mem://?max_size=1&max_size=2", wantErr: "2 times"},
		"memory's free disk":         {url: "mem://?min_free=1GB", wantErr: "does not apply"},
		"bucket's size":              {url: "gs://b?max_size=1GB", wantErr: "does not apply"},
		"single store's copies":      {url: "mem://?max_blob_size=1GB", wantErr: "does not apply"},
		"no unit":                    {url: "mem://?max_size=10", wantErr: "10 bytes holds nothing"},
		"unknown scheme":             {url: "gopher://x", wantErr: "file:///DIRECTORY"},
		"plain path":                 {url: "/var/cache", wantErr: "file:///DIRECTORY"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := open.Open(t.Context(), open.Options{}, tc.url)
			if tc.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tc.wantErr) {
					t.Fatalf("Open(%q) = %v, want an error with %q", tc.url, err, tc.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			d, err := blob.PutBytes(t.Context(), s, digest.SHA256, []byte("hello"))
			if err != nil {
				t.Error(err)
			}
			got, err := blob.ReadAll(t.Context(), s, d, 100)
			if string(got) != "hello" {
				t.Errorf("read back %q, %v", got, err)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
