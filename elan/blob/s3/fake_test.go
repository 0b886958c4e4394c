package s3_test

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"hash/crc32"
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/mettle-build/mettle/elan/blob/bucket"
	"github.com/mettle-build/mettle/elan/blob/bucket/buckettest"
	"github.com/mettle-build/mettle/elan/blob/s3"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	bucketName = "b"
	prefix     = "pre/fix"
)

// operation names the requests of S3 for buckettest.
func operation(r *http.Request) string {
	q := r.URL.Query()
	switch {
	case q.Has("list-type"):
		return "list"
	case strings.Count(strings.Trim(r.URL.Path, "/"), "/") == 0:
		return "check"
	case r.Method == http.MethodHead:
		return "stat"
	case r.Method == http.MethodGet:
		return "get"
	case r.Method == http.MethodDelete && q.Has("uploadId"):
		return "abort"
	case r.Method == http.MethodDelete:
		return "delete"
	case r.Method == http.MethodPost && q.Has("uploads"):
		return "begin"
	case r.Method == http.MethodPost:
		return "end"
	case q.Has("uploadId"):
		return "part"
	case r.Header.Get("X-Amz-Copy-Source") != "":
		return "touch"
	}
	return "put"
}

// strict adds to gofakes3 what it lacks of S3: checksums, and conditions on
// copies and on the ends of multipart uploads.
type strict struct {
	next http.Handler
	back gofakes3.Backend

	mu   sync.Mutex
	sums map[string]string // by path
}

func crc(data []byte) string {
	sum := crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli))
	return base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, sum))
}

// ServeHTTP implements http.Handler.
func (s *strict) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	const sumHeader = "X-Amz-Checksum-Crc32c"
	refuse := func(status int, code string) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, "<Error><Code>"+code+"</Code></Error>")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := r.Header.Get(sumHeader)
	switch op := operation(r); op {
	case "put", "part":
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		if sum != crc(body) {
			refuse(http.StatusBadRequest, "BadDigest")
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
	case "end", "touch":
		key := strings.TrimPrefix(r.URL.Path, "/"+bucketName+"/")
		o, err := s.back.HeadObject(bucketName, key)
		there := err == nil
		etag := ""
		if there {
			etag = `"` + hexOf(o.Hash) + `"`
		}
		if r.Header.Get("If-None-Match") == "*" && there || r.Header.Get("If-Match") != "" && r.Header.Get("If-Match") != etag {
			refuse(http.StatusPreconditionFailed, "PreconditionFailed")
			return
		}
	case "get":
		if known := s.sums[r.URL.Path]; known != "" && r.Header.Get("X-Amz-Checksum-Mode") == "ENABLED" {
			w.Header().Set(sumHeader, known)
			w.Header().Set("X-Amz-Checksum-Type", "FULL_OBJECT")
		}
	}
	rec := &recorder{ResponseWriter: w, code: http.StatusOK}
	s.next.ServeHTTP(rec, r)
	if op := operation(r); rec.code == http.StatusOK && (op == "put" || op == "end") {
		s.sums[r.URL.Path] = sum
	}
}

func hexOf(b []byte) string {
	const digits = "0123456789abcdef"
	var s strings.Builder
	for _, c := range b {
		s.WriteByte(digits[c>>4])
		s.WriteByte(digits[c&15])
	}
	return s.String()
}

type recorder struct {
	http.ResponseWriter
	code int
}

// WriteHeader implements http.ResponseWriter.
func (r *recorder) WriteHeader(code int) {
	r.code = code
	r.ResponseWriter.WriteHeader(code)
}

func objectName(d digest.Digest) string {
	return prefix + "/cas/" + d.Function().String() + "/" + d.Hash() + "-" + strconv.FormatInt(d.Size(), 10)
}

// env starts a fake S3 with a bucket.
func env(t testing.TB) *buckettest.Env {
	t.Helper()
	back := s3mem.New()
	if err := back.CreateBucket(bucketName); err != nil {
		t.Fatal(err)
	}
	handler := &strict{next: gofakes3.New(back).Server(), back: back, sums: map[string]string{}}
	// rewrite puts an object again, changed.
	rewrite := func(t testing.TB, d digest.Digest, change func(meta map[string]string, data []byte) []byte) {
		o, err := back.GetObject(bucketName, objectName(d), nil)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(o.Contents)
		if err != nil {
			t.Fatal(err)
		}
		meta := maps.Clone(o.Metadata)
		data = change(meta, data)
		if _, err := back.PutObject(bucketName, objectName(d), meta, bytes.NewReader(data), int64(len(data)), nil); err != nil {
			t.Fatal(err)
		}
	}
	e := &buckettest.Env{
		Proxy: buckettest.NewProxy(t, handler, operation),
		Age: func(t testing.TB, d digest.Digest, age time.Duration) {
			rewrite(t, d, func(meta map[string]string, data []byte) []byte {
				meta["Last-Modified"] = time.Now().Add(-age).UTC().Format(http.TimeFormat)
				return data
			})
		},
		AgeOf: func(t testing.TB, d digest.Digest) (time.Duration, bool) {
			o, err := back.HeadObject(bucketName, objectName(d))
			if err != nil {
				return 0, false
			}
			used, err := time.Parse(http.TimeFormat, o.Metadata["Last-Modified"])
			if err != nil {
				t.Error(err)
			}
			return time.Since(used), true
		},
		Shorten: func(t testing.TB, d digest.Digest) {
			rewrite(t, d, func(_ map[string]string, data []byte) []byte { return data[:len(data)-1] })
		},
	}
	e.New = func(t testing.TB, o bucket.Options) (*bucket.Store, error) {
		t.Setenv("AWS_ENDPOINT_URL", e.URL)
		t.Setenv("AWS_ACCESS_KEY_ID", "id")
		t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
		t.Setenv("AWS_REGION", "")
		return s3.New(t.Context(), s3.Options{Bucket: bucketName, Prefix: "/" + prefix, Options: o}.AnyChunk())
	}
	return e
}
