package open_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fsouza/fake-gcs-server/fakestorage"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/bucket/buckettest"
	"github.com/mettle-build/mettle/elan/blob/open"
	"github.com/mettle-build/mettle/elan/digest"
)

// newBucket starts a fake Google Cloud Storage with the bucket b, and counts the
// requests to it.
func newBucket(t testing.TB) *buckettest.Proxy {
	t.Helper()
	fake, err := fakestorage.NewServerWithOptions(fakestorage.Options{NoListener: true})
	if err != nil {
		t.Fatal(err)
	}
	fake.CreateBucketWithOpts(fakestorage.CreateBucketOpts{Name: "b"})
	p := buckettest.NewProxy(t, fake.HTTPHandler(), func(r *http.Request) string {
		switch {
		case strings.HasPrefix(r.URL.Path, "/batch/"):
			body, _ := io.ReadAll(r.Body)
			r.Body = io.NopCloser(bytes.NewReader(body))
			return "batch"
		case strings.HasPrefix(r.URL.Path, "/upload/"):
			return "put"
		case r.URL.Query().Get("alt") == "media":
			return "get"
		}
		return "other"
	})
	t.Setenv("STORAGE_EMULATOR_HOST", p.URL)
	return p
}

func openAll(t testing.TB, o open.Options, urls ...string) open.Storage {
	t.Helper()
	s, err := open.Open(t.Context(), o, urls...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestOpen_tierErrors(t *testing.T) {
	dir := "file://" + t.TempDir()
	for name, tc := range map[string]struct {
		urls    []string
		o       open.Options
		wantErr string
	}{
		"none":                        {wantErr: "no storage URL"},
		"a size for all":              {urls: []string{"mem://", dir}, o: open.Options{MaxBytes: 1}, wantErr: "max_size"},
		"one twice":                   {urls: []string{dir, dir + "/"}, wantErr: "twice"},
		"a copy's lifetime":           {urls: []string{"mem://?min_lifetime=1h", dir}, wantErr: "does not apply to this tier"},
		"a bound for what has it all": {urls: []string{"mem://", dir + "?max_blob_size=1"}, wantErr: "does not apply to this tier"},
		"two sizes for one":           {urls: []string{"mem://?max_size=2MB"}, o: open.Options{MaxBytes: 1e6}, wantErr: "--max_size too"},
		"a size for a bucket":         {urls: []string{"gs://b"}, o: open.Options{MaxBytes: 1e9}, wantErr: "leave --max_size out"},
		// What was opened before the error is closed.
		"the second does not open": {urls: []string{dir, "file:///dev/null/x"}, wantErr: "/dev/null/x"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := open.Open(t.Context(), tc.o, tc.urls...); err == nil || !strings.Contains(err.Error(), tc.wantErr) {
				t.Errorf("error %v, want one with %q", err, tc.wantErr)
			}
		})
	}
	openAll(t, open.Options{}, "mem://", dir) // its lock is free
}

func TestOpen_tiers(t *testing.T) {
	if testing.Short() {
		t.Skip("the suite over a fake server takes seconds")
	}
	for name, urls := range map[string][]string{
		"three":      {"mem://?max_size=300MB", "file://DIR", "gs://b/pre"},
		"compressed": {"mem://?max_size=300MB&compress=zstd", "gs://b/pre?compress=zstd"},
	} {
		t.Run(name, func(t *testing.T) {
			blobtest.Run(t, blobtest.Options{
				FindDigests: 500, // the fake looks through all of its objects for each
				New: func(t testing.TB) blob.Store {
					newBucket(t)
					own := slices.Clone(urls)
					for i, u := range own {
						own[i] = strings.ReplaceAll(u, "DIR", t.TempDir())
					}
					return openAll(t, open.Options{Registerer: prometheus.NewPedanticRegistry()}, own...)
				},
			})
		})
	}
}

// A bucket's blobs as they are and those as zstd are apart, whatever the option
// says; and text takes less room.
func TestOpen_compressedBucket(t *testing.T) {
	newBucket(t)
	packed, plain := openAll(t, open.Options{}, "gs://b/pre?compress=zstd"), openAll(t, open.Options{}, "gs://b/pre")
	for _, size := range []int{1000, 300_000, 20 << 20} { // in one request, and in several
		data := bytes.Repeat([]byte("the same words again and again, "), size/32)
		d := blobtest.Put(t, packed, digest.SHA256, data)
		if missing, err := plain.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 {
			t.Errorf("a container is taken for a blob, error %v", err)
		}
		if got, err := blob.ReadAll(t.Context(), packed, d, d.Size()); err != nil || !bytes.Equal(got, data) {
			t.Errorf("read %d bytes, error %v", len(got), err)
		}
		l, ok := blob.As[blob.Statter](packed)
		if !ok {
			t.Fatal("a bucket tells nothing of its blobs")
		}
		if info, err := l.Stat(t.Context(), d); err != nil || info.StoredBytes > d.Size()/5 {
			t.Errorf("%d bytes are kept in %d, error %v", d.Size(), info.StoredBytes, err)
		}
		blobtest.Put(t, plain, digest.SHA256, data)
		r, _ := blob.As[blob.Remover](packed)
		if err := r.Remove(t.Context(), d); err != nil {
			t.Error(err)
		}
		if got, err := blob.ReadAll(t.Context(), plain, d, d.Size()); err != nil || !bytes.Equal(got, data) {
			t.Errorf("with the container the blob is gone: read %d bytes, error %v", len(got), err)
		}
	}
}

// taking is a bucket that takes all that is put into it, and keeps nothing: the
// fake server is slow with ten thousand objects.
type taking struct{}

func (taking) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n, _ := io.Copy(io.Discard, r.Body)
	w.Header().Set("Content-Type", "application/json")
	if r.Method == http.MethodPost {
		fmt.Fprintf(w, `{"kind":"storage#object","bucket":"b","name":"x","generation":"1","metageneration":"1","size":"%d"}`, n)
		return
	}
	fmt.Fprint(w, `{"kind":"storage#objects"}`)
}

// Ten thousand digests that were written lately cost no request.
func TestOpen_knownDigests(t *testing.T) {
	const all = 10_000
	p := buckettest.NewProxy(t, taking{}, func(*http.Request) string { return "any" })
	t.Setenv("STORAGE_EMULATOR_HOST", p.URL)
	s := openAll(t, open.Options{}, "gs://b/pre")
	ds := make([]digest.Digest, all)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < all; i = next.Add(1) - 1 {
				ds[i] = blobtest.Put(t, s, digest.SHA256, fmt.Append(nil, i))
			}
		})
	}
	wg.Wait()
	if n := p.Counts()["any"]; n != all+1 {
		t.Errorf("%d requests for opening the bucket and %d writes", n, all)
	}
	wantNoRequest(t, p, s, ds)
}

// What one server was told is known to it the next time.
func TestOpen_askedDigests(t *testing.T) {
	const all = 500
	p := newBucket(t)
	writer := openAll(t, open.Options{}, "gs://b/pre")
	ds := make([]digest.Digest, all)
	for i := range ds {
		ds[i] = blobtest.Put(t, writer, digest.SHA256, fmt.Append(nil, i))
	}
	s := openAll(t, open.Options{}, "gs://b/pre")
	p.Reset()
	if missing, err := s.FindMissing(t.Context(), ds); len(missing) > 0 || err != nil {
		t.Errorf("%d missing, error %v", len(missing), err)
	}
	if n := p.Counts()["batch"]; n != all/100 {
		t.Errorf("%d requests, want one for each 100 digests", n)
	}
	wantNoRequest(t, p, s, ds)
}

func wantNoRequest(t testing.TB, p *buckettest.Proxy, s blob.Store, ds []digest.Digest) {
	t.Helper()
	p.Reset()
	if missing, err := s.FindMissing(t.Context(), ds); len(missing) > 0 || err != nil {
		t.Errorf("%d missing, error %v", len(missing), err)
	}
	if counts := p.Counts(); len(counts) > 0 {
		t.Errorf("requests %v for %d known digests, want none", counts, len(ds))
	}
}

// A blob that only the bucket has is fetched once, for memory and disk.
func TestOpen_readsBucketOnce(t *testing.T) {
	p := newBucket(t)
	writer := openAll(t, open.Options{}, "gs://b/pre")
	small, large := blobtest.Random(1, 5000), blobtest.Random(2, 3<<20)
	ds, de := blobtest.Put(t, writer, digest.SHA256, small), blobtest.Put(t, writer, digest.SHA256, large)
	k := blob.EntryKey{Instance: "main", Action: ds}
	if err := writer.PutEntry(t.Context(), k, []byte("first")); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := openAll(t, open.Options{}, "mem://", "file://"+dir, "gs://b/pre")
	p.Reset()
	for range 3 {
		for d, want := range map[digest.Digest][]byte{ds: small, de: large} {
			if got, err := blob.ReadAll(t.Context(), s, d, d.Size()); err != nil || !bytes.Equal(got, want) {
				t.Errorf("read %s: %d bytes, error %v", d, len(got), err)
			}
		}
	}
	if n := p.Counts()["get"]; n != 2 {
		t.Errorf("the bucket was read %d times, want once for each of 2 blobs", n)
	}
	// Entries are the bucket's, and nobody else's.
	for _, value := range []string{"first", "second"} {
		if err := writer.PutEntry(t.Context(), k, []byte(value)); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Entry(t.Context(), k); err != nil || string(got) != value {
			t.Errorf("entry %q, %v; want %q", got, err, value)
		}
	}
	dst := filepath.Join(t.TempDir(), "f")
	l, ok := blob.As[blob.Linker](s)
	if !ok {
		t.Fatal("a directory among the tiers, and no links")
	}
	if err := l.Link(t.Context(), de, dst, blob.LinkRegular); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(dst); err != nil || !bytes.Equal(got, large) {
		t.Errorf("linked %d bytes, error %v", len(got), err)
	}
}

// Two servers with the same stores have the same metrics, and close them all.
func TestOpen_metrics(t *testing.T) {
	newBucket(t)
	reg := prometheus.NewPedanticRegistry()
	for range 2 {
		s, err := open.Open(t.Context(), open.Options{Registerer: reg, MinLifetime: time.Hour}, "mem://", "mem://?max_size=1MB", "file://"+t.TempDir(), "gs://b/pre")
		if err != nil {
			t.Fatal(err)
		}
		d := blobtest.Put(t, s, digest.SHA256, []byte("x"))
		if _, err := blob.ReadAll(t.Context(), s, d, 1); err != nil {
			t.Error(err)
		}
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		problems, err := promlint.NewWithMetricFamilies(families).Lint()
		if err != nil || len(problems) > 0 {
			t.Errorf("promlint: %v, error %v", problems, err)
		}
		stores := map[string]bool{}
		for _, f := range families {
			for _, m := range f.Metric {
				for _, l := range m.Label {
					if l.GetName() == "store" || l.GetName() == "tier" {
						stores[l.GetValue()] = true
					}
				}
			}
		}
		for _, name := range []string{"mem", "mem2", "file", "gs"} {
			if !stores[name] {
				t.Errorf("no metrics of %s", name)
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if families, err := reg.Gather(); err != nil || len(families) > 0 {
			t.Errorf("%d families are left, error %v", len(families), err)
		}
	}
}
