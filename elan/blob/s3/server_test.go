package s3_test

import (
	"fmt"
	"net/url"
	"os"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/s3"
)

// serverVar has the URL of a bucket at a real server, as --storage takes it. Its
// credentials are where the AWS configuration has them.
const serverVar = "METTLE_TEST_S3"

// TestServer runs the suite of all stores over a real server; the README says
// which ones it was run over. What it writes stays there, below one prefix.
func TestServer(t *testing.T) {
	if os.Getenv(serverVar) == "" {
		t.Skip(serverVar + " names no bucket of a server: the README says how to run one")
	}
	u, err := url.Parse(os.Getenv(serverVar))
	if err != nil {
		t.Fatal(err)
	}
	o, err := s3.ParseURL(u)
	if err != nil {
		t.Fatal(err)
	}
	prefix, stores := fmt.Sprintf("%s/test-%d", o.Prefix, time.Now().UnixNano()), 0
	blobtest.Run(t, blobtest.Options{
		FindDigests: 2000, // each a request
		New: func(t testing.TB) blob.Store {
			o := o
			stores++
			o.Prefix = fmt.Sprintf("%s/%d", prefix, stores)
			s, err := s3.New(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			return s
		},
	})
}
