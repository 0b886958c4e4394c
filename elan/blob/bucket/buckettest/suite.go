package buckettest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/bucket"
	"github.com/mettle-build/mettle/elan/digest"
)

// Env is a fake bucket.
type Env struct {
	*Proxy
	// New opens a store over the bucket. The test closes it.
	New func(t testing.TB, o bucket.Options) (*bucket.Store, error)
	// Age makes the blob d, which is there, one that was last used that long ago.
	Age func(t testing.TB, d digest.Digest, age time.Duration)
	// AgeOf tells how long ago the blob d was last used. ok: it is there.
	AgeOf func(t testing.TB, d digest.Digest) (age time.Duration, ok bool)
	// Shorten takes the last byte off the object of the blob d.
	Shorten func(t testing.TB, d digest.Digest)
}

// Open is New, which has to succeed.
func (e *Env) Open(t testing.TB, o bucket.Options) *bucket.Store {
	t.Helper()
	s, err := e.New(t, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Options tell Run of the driver.
type Options struct {
	// New returns an empty bucket.
	New func(t testing.TB) *Env
	// BatchSize is the driver's.
	BatchSize int
	// ChunkBytes is the smallest that the driver takes.
	ChunkBytes int
}

// large is the size of a blob of three chunks.
func (o Options) large() int { return 2*o.ChunkBytes + 1000 }

const (
	attempts  = 4
	smallSize = 100 << 10
)

// fast are options with which failures are quick.
func (o Options) fast() bucket.Options {
	return bucket.Options{
		Attempts: attempts, Backoff: time.Millisecond, Timeout: 10 * time.Second, ChunkBytes: o.ChunkBytes,
		TouchEvery: 24 * time.Hour, ExpireAfter: 30 * 24 * time.Hour,
	}
}

// setUp returns a bucket, and a store over it that lives as long as the test.
func setUp(t *testing.T, o Options, bo bucket.Options) (*Env, *bucket.Store) {
	t.Helper()
	e := o.New(t)
	s := e.Open(t, bo)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	e.Reset()
	return e, s
}

// Run tests the driver that o is of.
func Run(t *testing.T, o Options) {
	t.Helper()
	for _, c := range []struct {
		name string
		run  func(t *testing.T, o Options)
	}{
		{"passing_faults", testPassing},
		{"lasting_faults", testLasting},
		{"refusals", testRefusals},
		{"broken_reads", testBrokenReads},
		{"damaged", testDamaged},
		{"stalls", testStalls},
		{"large_uploads", testLarge},
		{"concurrency", testConcurrency},
		{"buffers", testBuffers},
		{"lifetimes", testLifetimes},
		{"touch_fails", testTouchFails},
		{"wrong_size", testWrongSize},
		{"no_bucket", testNoBucket},
		{"list", testList},
		{"containers", testContainers},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, o) })
	}
}

func random(size int) []byte {
	data := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{byte(size), byte(size >> 8), byte(size >> 16)}).Read(data) // never fails
	return data
}

func put(t testing.TB, s *bucket.Store, data []byte) digest.Digest {
	t.Helper()
	d := digest.Of(digest.SHA256, data)
	if err := blob.Receive(t.Context(), s, d, bytes.NewReader(data)); err != nil {
		t.Fatalf("put: %v", err)
	}
	return d
}

// wantBlob fails the test unless d is there, and its bytes are data.
func wantBlob(t testing.TB, s *bucket.Store, d digest.Digest, data []byte) {
	t.Helper()
	missing, err := s.FindMissing(t.Context(), []digest.Digest{d})
	if err != nil || len(missing) > 0 {
		t.Errorf("find: missing %v, error %v", missing, err)
	}
	got, err := blob.ReadAll(t.Context(), s, d, int64(len(data)))
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("read %d bytes, error %v; want the %d that were written", len(got), err, len(data))
	}
}

func wantCounts(t testing.TB, e *Env, want map[string]int) {
	t.Helper()
	if diff := cmp.Diff(want, e.Counts()); diff != "" {
		t.Errorf("requests, -want +got:\n%s", diff)
	}
}

// ops are calls that make requests of one operation. Each fails where it can't
// do what it is for.
func ops(s *bucket.Store, d digest.Digest, data []byte) map[string]func(ctx context.Context) error {
	k := blob.EntryKey{Instance: "i", Action: d}
	return map[string]func(ctx context.Context) error{
		"stat": func(ctx context.Context) error {
			absent := digest.Of(digest.SHA256, []byte("absent"))
			missing, err := s.FindMissing(ctx, []digest.Digest{d, absent, d})
			if err == nil && (len(missing) != 1 || missing[0] != absent) {
				err = fmt.Errorf("missing are %v", missing)
			}
			return err
		},
		"get": func(ctx context.Context) error {
			got, err := blob.ReadAll(ctx, s, d, int64(len(data)))
			if err == nil && !bytes.Equal(got, data) {
				err = errors.New("other bytes")
			}
			return err
		},
		"put": func(ctx context.Context) error {
			_, err := blob.PutBytes(ctx, s, digest.SHA256, append(slices.Clip(data), 'x'))
			return err
		},
		"put entry": func(ctx context.Context) error { return s.PutEntry(ctx, k, data) },
		"get entry": func(ctx context.Context) error {
			got, err := s.Entry(ctx, k)
			if err == nil && !bytes.Equal(got, data) {
				err = errors.New("other bytes")
			}
			return err
		},
		"delete": func(ctx context.Context) error {
			return s.DeleteEntry(ctx, blob.EntryKey{Instance: "other", Action: d})
		},
	}
}

// order is that of ops in which an entry is written before it is read.
//
//nolint:gochecknoglobals // an immutable table
var order = []string{"stat", "get", "put", "put entry", "get entry", "delete"}

// request is the operation of the request that ops[name] begins with.
func request(name string) string {
	switch name {
	case "put entry":
		return "put"
	case "get entry":
		return "get"
	}
	return name
}

// testPassing: what passes after a while is nobody's trouble.
func testPassing(t *testing.T, o Options) {
	for _, c := range []struct {
		name  string
		fault Fault
	}{
		{"429", Status(http.StatusTooManyRequests)},
		{"500", Status(http.StatusInternalServerError)},
		{"503", Status(http.StatusServiceUnavailable)},
		{"408", Status(http.StatusRequestTimeout)},
		{"reset", Reset},
		{"lost_answer", LoseAnswer},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, s := setUp(t, o, o.fast())
			data := random(smallSize)
			d := put(t, s, data)
			calls := ops(s, d, data)
			for _, name := range order {
				e.Reset()
				op := request(name)
				e.Inject(op, attempts-1, c.fault)
				if err := calls[name](t.Context()); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				// A lost answer makes the stat after a put that was there; one
				// absent digest in a batch of one makes another.
				want, got := attempts, e.Counts()[op]
				if op == "stat" && o.BatchSize == 1 {
					want++
				}
				if got != want {
					t.Errorf("%s: %d requests, want %d", name, got, want)
				}
			}
			wantBlob(t, s, d, data)
		})
	}
}

// testLasting: what lasts is ErrUnavailable, after a bounded number of requests,
// and never "missing".
func testLasting(t *testing.T, o Options) {
	for _, c := range []struct {
		name  string
		fault Fault
	}{{"503", Status(http.StatusServiceUnavailable)}, {"429", Status(http.StatusTooManyRequests)}, {"reset", Reset}} {
		t.Run(c.name, func(t *testing.T) {
			e, s := setUp(t, o, o.fast())
			data := random(smallSize)
			d := put(t, s, data)
			calls := ops(s, d, data)
			if err := calls["put entry"](t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, name := range order {
				e.Reset()
				op := request(name)
				e.Inject(op, -1, c.fault)
				err := calls[name](t.Context())
				if !errors.Is(err, blob.ErrUnavailable) || errors.Is(err, blob.ErrNotFound) {
					t.Errorf("%s: %v, want ErrUnavailable", name, err)
				}
				// Two digests that are asked for one by one may both be tried.
				limit := attempts
				if op == "stat" && o.BatchSize == 1 {
					limit *= 2
				}
				if c.name == "reset" {
					limit *= 2 // net/http repeats what failed on a connection that was used before
				}
				if got := e.Counts()[op]; got < attempts || got > limit {
					t.Errorf("%s: %d requests, want %d to %d", name, got, attempts, limit)
				}
			}
			e.Reset()
			wantBlob(t, s, d, data)
		})
	}
}

// testRefusals: what won't help is not tried again, and says nothing of the blob.
func testRefusals(t *testing.T, o Options) {
	for _, name := range order {
		for _, code := range []int{http.StatusForbidden, http.StatusUnauthorized} {
			// A bucket for each: what one call gave up may reach its bucket later.
			e, s := setUp(t, o, o.fast())
			data := random(smallSize)
			d := put(t, s, data)
			calls := ops(s, d, data)
			if err := calls["put entry"](t.Context()); err != nil {
				t.Fatal(err)
			}
			e.Reset()
			op := request(name)
			e.Inject(op, -1, Status(code))
			err := calls[name](t.Context())
			if !errors.Is(err, blob.ErrUnavailable) || errors.Is(err, blob.ErrNotFound) {
				t.Errorf("%s with %d: %v, want ErrUnavailable", name, code, err)
			}
			if got := e.Counts()[op]; got > 1 && o.BatchSize > 1 || got > 2 {
				t.Errorf("%s with %d: %d requests, want one", name, code, got)
			}
		}
	}
}

// testBrokenReads: a read goes on where the connection broke.
func testBrokenReads(t *testing.T, o Options) {
	e, s := setUp(t, o, o.fast())
	data := random(smallSize)
	d := put(t, s, data)
	for _, offset := range []int64{0, 1000} {
		e.Reset()
		e.Inject("get", 3, Truncate) // 1/2, 3/4, 7/8
		r, err := s.Open(t.Context(), d, offset)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err = errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, data[offset:]) {
			t.Errorf("read from %d: %d bytes, error %v", offset, len(got), err)
		}
		wantCounts(t, e, map[string]int{"get": 4})
	}
	e.Reset()
	e.Inject("get", -1, TruncateAll)
	if got, err := blob.ReadAll(t.Context(), s, d, d.Size()); !errors.Is(err, blob.ErrUnavailable) || errors.Is(err, blob.ErrNotFound) {
		t.Errorf("connections that bring nothing: %d bytes, error %v, want ErrUnavailable", len(got), err)
	}
	if got := e.Counts()["get"]; got > attempts+1 {
		t.Errorf("%d requests for connections that bring nothing, want at most %d", got, attempts+1)
	}
}

// testDamaged: bytes that changed on the way are not taken for the blob.
func testDamaged(t *testing.T, o Options) {
	e, s := setUp(t, o, o.fast())
	data := random(smallSize)
	d := put(t, s, data)
	e.Inject("get", 1, Corrupt)
	if _, err := blob.ReadAll(t.Context(), s, d, d.Size()); !errors.Is(err, blob.ErrCorrupt) {
		t.Errorf("read of damaged bytes: %v, want ErrCorrupt", err)
	}
	wantBlob(t, s, d, data)

	e.Reset()
	e.Inject("put", 2, CorruptRequest)
	other := random(smallSize + 1)
	od := put(t, s, other)
	wantCounts(t, e, map[string]int{"put": 3})
	wantBlob(t, s, od, other)

	k := blob.EntryKey{Action: d}
	if err := s.PutEntry(t.Context(), k, data); err != nil {
		t.Fatal(err)
	}
	e.Reset()
	e.Inject("get", 1, Corrupt)
	if got, err := s.Entry(t.Context(), k); err != nil || !bytes.Equal(got, data) {
		t.Errorf("entry damaged once: %d bytes, error %v", len(got), err)
	}
	e.Inject("get", -1, Corrupt)
	if _, err := s.Entry(t.Context(), k); err == nil || errors.Is(err, blob.ErrNotFound) {
		t.Errorf("entry damaged for ever: %v, want another error than ErrNotFound", err)
	}
}

// testStalls: a bucket that does not answer is asked again, and a caller who
// leaves does not wait for it.
func testStalls(t *testing.T, o Options) {
	bo := o.fast()
	bo.Timeout = 100 * time.Millisecond
	e, s := setUp(t, o, bo)
	data := random(smallSize)
	d := put(t, s, data)
	calls := ops(s, d, data)
	for _, name := range order {
		e.Inject(request(name), 1, Stall)
		if err := calls[name](t.Context()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	e.Reset()
	for _, name := range order {
		e.Inject(request(name), -1, Stall)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		start := time.Now()
		err := calls[name](ctx)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
			t.Errorf("%s whose caller leaves: %v after %v", name, err, time.Since(start))
		}
	}
}
