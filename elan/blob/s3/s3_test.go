package s3_test

import (
	"net/url"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/bucket"
	"github.com/mettle-build/mettle/elan/blob/bucket/buckettest"
	"github.com/mettle-build/mettle/elan/blob/s3"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStore(t *testing.T) {
	blobtest.Run(t, blobtest.Options{
		FindDigests: 2000, // each a request, signed, with the race detector
		New: func(t testing.TB) blob.Store {
			s := env(t).Open(t, bucket.Options{})
			t.Cleanup(func() { s.Close() })
			return s
		},
	})
}

func TestFaults(t *testing.T) {
	buckettest.Run(t, buckettest.Options{New: env, BatchSize: 1, ChunkBytes: 256 << 10})
}

// The table of the README.
func TestCosts(t *testing.T) {
	buckettest.Costs(t, buckettest.Options{New: env, BatchSize: 1, ChunkBytes: 256 << 10}, map[string]map[string]int{
		"find 1000":           {"stat": 1000},
		"put":                 {"put": 1},
		"put again":           {"put": 1, "stat": 1},
		"put 3 chunks":        {"stat": 1, "begin": 1, "part": 3, "end": 1},
		"put 3 chunks again":  {"stat": 1},
		"read":                {"get": 1},
		"put entry":           {"put": 1},
		"get entry":           {"get": 1},
		"delete entry":        {"delete": 1},
		"find 2 of last week": {"check": 1, "stat": 2, "touch": 2},
		"read of last week":   {"check": 1, "get": 1, "touch": 1},
	})
}

func TestNew_refuses(t *testing.T) {
	for name, o := range map[string]s3.Options{
		"no bucket":     {},
		"two buckets":   {Bucket: "a/b"},
		"small chunk":   {Bucket: "b", Options: bucket.Options{ChunkBytes: 1 << 20}},
		"long lifetime": {Bucket: "b", Options: bucket.Options{MinLifetime: 30 * 24 * time.Hour}},
		"strange path":  {Bucket: "b", Prefix: "a/../b"},
	} {
		t.Run(name, func(t *testing.T) {
			if s, err := s3.New(t.Context(), o); err == nil {
				_ = s.Close()
				t.Error("no error")
			}
		})
	}
}

func TestParseURL(t *testing.T) {
	u, err := url.Parse("s3://b/some/prefix?region=eu-west-1&endpoint=http://minio:9000&path_style=true&expire_after=240h&max_requests=7")
	if err != nil {
		t.Fatal(err)
	}
	got, err := s3.ParseURL(u)
	if err != nil {
		t.Fatal(err)
	}
	if got.Bucket != "b" || got.Prefix != "/some/prefix" || got.Region != "eu-west-1" || got.Endpoint != "http://minio:9000" ||
		!got.PathStyle || got.ExpireAfter != 240*time.Hour || got.MaxRequests != 7 {
		t.Errorf("options %+v", got)
	}
	for _, query := range []string{"path_style=perhaps", "max_requests=many", "expire_after=1h&expire_after=2h", "what=this"} {
		u.RawQuery = query
		if _, err := s3.ParseURL(u); err == nil {
			t.Errorf("%s: no error", query)
		}
	}
}
