package gcs_test

import (
	"bytes"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fsouza/fake-gcs-server/fakestorage"
	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/bucket"
	"github.com/mettle-build/mettle/elan/blob/bucket/buckettest"
	"github.com/mettle-build/mettle/elan/blob/gcs"
	"github.com/mettle-build/mettle/elan/digest"
)

func TestMain(m *testing.M) {
	// Started by an init of the client library's dependencies.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

// operation names the requests of the JSON API for buckettest.
func operation(r *http.Request) string {
	upload := strings.HasPrefix(r.URL.Path, "/upload/")
	switch {
	case strings.HasPrefix(r.URL.Path, "/batch/"):
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		if bytes.Contains(body, []byte("PATCH /")) {
			return "touch"
		}
		return "stat"
	case upload && r.URL.Query().Get("uploadType") == "multipart":
		return "put"
	case upload && r.URL.Query().Get("upload_id") != "":
		return "part"
	case upload:
		return "begin"
	case r.Method == http.MethodDelete:
		return "delete"
	case r.URL.Query().Get("alt") == "media":
		return "get"
	case r.URL.Query().Get("maxResults") != "1":
		return "list"
	}
	return "check"
}

const (
	bucketName = "b"
	prefix     = "pre/fix"
)

func objectName(d digest.Digest) string {
	return prefix + "/cas/" + d.Function().String() + "/" + d.Hash() + "-" + strconv.FormatInt(d.Size(), 10)
}

// newEnv starts a fake Google Cloud Storage with a bucket.
func newEnv(t testing.TB) *buckettest.Env {
	t.Helper()
	fake, err := fakestorage.NewServerWithOptions(fakestorage.Options{NoListener: true})
	if err != nil {
		t.Fatal(err)
	}
	fake.CreateBucketWithOpts(fakestorage.CreateBucketOpts{Name: bucketName})
	object := func(t testing.TB, d digest.Digest) (fakestorage.Object, bool) {
		o, err := fake.GetObject(bucketName, objectName(d))
		return o, err == nil
	}
	return &buckettest.Env{
		Proxy: buckettest.NewProxy(t, fake.HTTPHandler(), operation),
		Age: func(t testing.TB, d digest.Digest, age time.Duration) {
			o, ok := object(t, d)
			if !ok {
				t.Fatalf("%s is not there", d)
			}
			o.CustomTime = time.Now().Add(-age)
			fake.CreateObject(o)
		},
		AgeOf: func(t testing.TB, d digest.Digest) (time.Duration, bool) {
			o, ok := object(t, d)
			return time.Since(o.CustomTime), ok
		},
		Shorten: func(t testing.TB, d digest.Digest) {
			o, ok := object(t, d)
			if !ok {
				t.Fatalf("%s is not there", d)
			}
			o.Content, o.Size, o.Crc32c, o.Md5Hash = o.Content[:len(o.Content)-1], 0, "", ""
			fake.CreateObject(o)
		},
	}
}

func open(t testing.TB, e *buckettest.Env, o bucket.Options) (*bucket.Store, error) {
	t.Helper()
	t.Setenv("STORAGE_EMULATOR_HOST", e.URL)
	return gcs.New(t.Context(), gcs.Options{Bucket: bucketName, Prefix: "/" + prefix, Options: o})
}

func env(t testing.TB) *buckettest.Env {
	e := newEnv(t)
	e.New = func(t testing.TB, o bucket.Options) (*bucket.Store, error) { return open(t, e, o) }
	return e
}

func TestStore(t *testing.T) {
	blobtest.Run(t, blobtest.Options{
		FindDigests: 1000, // the fake looks through all of its objects for each
		New: func(t testing.TB) blob.Store {
			s := env(t).Open(t, bucket.Options{})
			t.Cleanup(func() { s.Close() })
			return s
		},
	})
}

func TestFaults(t *testing.T) {
	buckettest.Run(t, buckettest.Options{New: env, BatchSize: 100, ChunkBytes: 256 << 10})
}

// The table of the README.
func TestCosts(t *testing.T) {
	buckettest.Costs(t, buckettest.Options{New: env, BatchSize: 100, ChunkBytes: 256 << 10}, map[string]map[string]int{
		"find 1000":           {"stat": 10},
		"put":                 {"put": 1},
		"put again":           {"put": 1, "stat": 1},
		"put 3 chunks":        {"stat": 1, "begin": 1, "part": 3},
		"put 3 chunks again":  {"stat": 1},
		"read":                {"get": 1},
		"put entry":           {"put": 1},
		"get entry":           {"get": 1},
		"delete entry":        {"delete": 1},
		"find 2 of last week": {"check": 1, "stat": 1, "touch": 1},
		"read of last week":   {"check": 1, "get": 1, "stat": 1, "touch": 1},
	})
}
