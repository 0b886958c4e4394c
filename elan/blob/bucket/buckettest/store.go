package buckettest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/bucket"
	"github.com/mettle-build/mettle/elan/digest"
)

// testLarge: blobs of several requests.
func testLarge(t *testing.T, o Options) {
	data := random(o.large())
	d := digest.Of(digest.SHA256, data)
	for _, c := range []struct {
		name, op string
		fault    Fault
		times    int
		good     bool
	}{
		{"part_passing", "part", Status(http.StatusServiceUnavailable), 1, true},
		{"part_refused", "part", Status(http.StatusForbidden), -1, false},
		{"part_reset", "part", Reset, 1, true},
		{"begin_refused", "begin", Status(http.StatusForbidden), -1, false},
		{"begin_passing", "begin", Status(http.StatusTooManyRequests), 1, true},
		{"part_damaged", "part", CorruptRequest, 1, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, s := setUp(t, o, o.fast())
			e.Inject(c.op, c.times, c.fault)
			err := blob.Receive(t.Context(), s, d, bytes.NewReader(data))
			e.Reset()
			switch {
			case err == nil && c.good:
				wantBlob(t, s, d, data)
				return
			case c.good && c.name == "part_damaged" && errors.Is(err, blob.ErrUnavailable):
				// What is told by the checksum of all bytes alone can't be mended
				// by one part; the client does it all again.
			case c.good || !errors.Is(err, blob.ErrUnavailable):
				t.Errorf("error %v, want good: %v", err, c.good)
			}
			wantMissing(t, s, d)
			if err := blob.Receive(t.Context(), s, d, bytes.NewReader(data)); err != nil {
				t.Errorf("after the trouble: %v", err)
			}
			wantBlob(t, s, d, data)
		})
	}
	t.Run("two_at_once", func(t *testing.T) { testTwoLarge(t, o) })
	t.Run("given_up", func(t *testing.T) { testGivenUp(t, o) })
}

func wantMissing(t testing.TB, s *bucket.Store, d digest.Digest) {
	t.Helper()
	if missing, err := s.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 {
		t.Errorf("find: missing %v, error %v; want it to be missing", missing, err)
	}
}

// testTwoLarge: two uploads of a blob that begin before one ends both succeed.
func testTwoLarge(t *testing.T, o Options) {
	_, s := setUp(t, o, o.fast())
	data := random(o.large())
	d := digest.Of(digest.SHA256, data)
	var ws [2]blob.Writer
	for i := range ws {
		w, err := s.Create(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close() //nolint:errcheck // closed below, where the test gets there
		if _, err := w.Write(data[:o.large()/2]); err != nil {
			t.Fatal(err)
		}
		ws[i] = w
	}
	for i, w := range ws {
		_, err := w.Write(data[o.large()/2:])
		if err = errors.Join(err, w.Commit(), w.Close()); err != nil {
			t.Errorf("writer %d: %v", i, err)
		}
	}
	wantBlob(t, s, d, data)
}

// testGivenUp: an upload that ends in the middle, or whose caller leaves, leaves
// no blob.
func testGivenUp(t *testing.T, o Options) {
	_, s := setUp(t, o, o.fast())
	data := random(o.large())
	d := digest.Of(digest.SHA256, data)
	for _, n := range []int{1, o.ChunkBytes, o.large() - 1, o.large()} {
		w, err := s.Create(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.Write(data[:n])
		if err = errors.Join(err, w.Close(), w.Close()); err != nil {
			t.Errorf("give up after %d bytes: %v", n, err)
		}
		wantMissing(t, s, d)
	}
	ctx, cancel := context.WithCancel(t.Context())
	w, err := s.Create(ctx, d)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write(data)
	cancel()
	if err := errors.Join(err, w.Commit()); !errors.Is(err, context.Canceled) {
		t.Errorf("commit after the caller left: %v, want Canceled", err)
	}
	if err := w.Close(); err != nil {
		t.Errorf("close after the caller left: %v", err)
	}
	wantMissing(t, s, d)
}

// testConcurrency: however many digests are asked for, and blobs read, a bounded
// number of requests is under way.
func testConcurrency(t *testing.T, o Options) {
	bo := o.fast()
	bo.MaxRequests, bo.MaxReads = 3, 2
	e, s := setUp(t, o, bo)
	var ds []digest.Digest
	for i := range 8 * o.BatchSize {
		ds = append(ds, digest.Of(digest.SHA256, []byte(strconv.Itoa(i))))
	}
	slow := func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		time.Sleep(5 * time.Millisecond) // so that more of them would meet
		next.ServeHTTP(w, r)
	}
	e.Inject("stat", -1, slow)
	missing, err := s.FindMissing(t.Context(), ds)
	if err != nil || len(missing) != len(ds) {
		t.Errorf("find: %d missing, error %v; want all %d", len(missing), err, len(ds))
	}
	wantCounts(t, e, map[string]int{"stat": 8})
	if most := e.Most(); most > bo.MaxRequests || most < 2 {
		t.Errorf("%d requests at once, want 2 to %d", most, bo.MaxRequests)
	}

	data := random(smallSize)
	d := put(t, s, data)
	var held []io.Closer
	for range bo.MaxReads {
		r, err := s.Open(t.Context(), d, 0)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, r)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Open(ctx, d, 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("open beyond MaxReads: %v, want it to wait", err)
	}
	if err := errors.Join(held[0].Close(), held[0].Close()); err != nil {
		t.Error(err)
	}
	wantBlob(t, s, d, data)
	if err := held[1].Close(); err != nil {
		t.Error(err)
	}
}

// testBuffers: writers wait for memory, and get it back.
func testBuffers(t *testing.T, o Options) {
	bo := o.fast()
	bo.MaxBufferBytes = int64(o.ChunkBytes)
	_, s := setUp(t, o, bo)
	data := random(o.ChunkBytes)
	d := digest.Of(digest.SHA256, data)
	w, err := s.Create(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Create(ctx, digest.Of(digest.SHA256, []byte("x"))); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("create without memory: %v, want it to wait", err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	var writers sync.WaitGroup
	for i := range 8 {
		writers.Go(func() {
			if _, err := blob.PutBytes(t.Context(), s, digest.SHA256, random(o.ChunkBytes-i)); err != nil {
				t.Errorf("writer %d: %v", i, err)
			}
		})
	}
	writers.Wait()
}

// testLifetimes: uses are written at most once in TouchEvery, and what is close
// to its end is missing until it is written again.
func testLifetimes(t *testing.T, o Options) {
	const day = 24 * time.Hour
	for _, c := range []struct {
		name    string
		age     time.Duration
		missing bool
		touched bool
	}{
		{"fresh", 23 * time.Hour, false, false},
		{"used_before_yesterday", 25 * time.Hour, false, true},
		{"a_day_and_an_hour_left", 29*day - time.Hour, false, true},
		{"less_than_a_day_left", 29*day + time.Hour, true, false},
		{"past_its_end", 40 * day, true, false},
	} {
		for _, size := range []int{smallSize, o.large()} {
			if size > smallSize && !c.missing {
				continue // what is there is touched whatever its size
			}
			t.Run(c.name+"/"+strconv.Itoa(size), func(t *testing.T) {
				e, first := setUp(t, o, o.fast())
				data := random(size)
				d := put(t, first, data)
				e.Age(t, d, c.age)
				missingNow, touched := c.missing, c.touched // by the first one
				// Two servers, of which neither knows what the other touched.
				for range 2 {
					e.Reset()
					s := e.Open(t, o.fast())
					missing, err := s.FindMissing(t.Context(), []digest.Digest{d, d})
					if err != nil || (len(missing) == 1) != missingNow {
						t.Errorf("find: missing %v, error %v; want missing: %v", missing, err, missingNow)
					}
					if missingNow {
						put(t, s, data)
						wantBlob(t, s, d, data)
					}
					for range 3 {
						wantBlob(t, s, d, data)
					}
					if err := s.Close(); err != nil { // writes the uses
						t.Error(err)
					}
					want := 0
					if touched {
						want = 1
					}
					if got := e.Counts()["touch"]; got != want {
						t.Errorf("%d touches, want %d", got, want)
					}
					age, ok := e.AgeOf(t, d)
					if untouched := !c.touched && !c.missing; !ok || !untouched && age > time.Hour {
						t.Errorf("the blob's age is %v (there: %v), want it to be new", age, ok)
					}
					missingNow, touched = false, false // by the second one
				}
			})
		}
	}
	t.Run("by_reading", func(t *testing.T) {
		e, first := setUp(t, o, o.fast())
		data := random(smallSize)
		d := put(t, first, data)
		e.Age(t, d, 5*day)
		s := e.Open(t, o.fast())
		for range 3 {
			if _, err := blob.ReadAll(t.Context(), s, d, d.Size()); err != nil {
				t.Error(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if age, ok := e.AgeOf(t, d); !ok || age > time.Hour {
			t.Errorf("the blob's age is %v (there: %v), want it to be new", age, ok)
		}
		if got := e.Counts()["touch"]; got != 1 {
			t.Errorf("%d touches, want 1", got)
		}
	})
}

// testTouchFails: a use that can't be written is nobody's error while the blob
// stays for long enough, and is written with the next use.
func testTouchFails(t *testing.T, o Options) {
	e, first := setUp(t, o, o.fast())
	data := random(smallSize)
	d := put(t, first, data)
	e.Age(t, d, 48*time.Hour)
	for _, works := range []bool{false, true} {
		if !works {
			e.Inject("touch", -1, Status(http.StatusForbidden))
		}
		s := e.Open(t, o.fast())
		wantBlob(t, s, d, data)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if age, _ := e.AgeOf(t, d); (age < time.Hour) != works {
			t.Errorf("the blob's age is %v, want a touch to have worked: %v", age, works)
		}
		e.Reset()
	}
}

// testWrongSize: an object that is not the blob's size, whoever put it there, is
// no blob, and is written over.
func testWrongSize(t *testing.T, o Options) {
	e, s := setUp(t, o, o.fast())
	data := random(smallSize)
	d := put(t, s, data)
	e.Shorten(t, d)
	wantMissing(t, s, d)
	for _, offset := range []int64{0, 10, d.Size() - 1, d.Size()} {
		if r, err := s.Open(t.Context(), d, offset); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("open at %d: %v, want ErrNotFound", offset, err)
			if err == nil {
				_ = r.Close()
			}
		}
	}
	put(t, s, data)
	wantBlob(t, s, d, data)
}

// testNoBucket: a bucket that is gone is not a bucket without blobs.
func testNoBucket(t *testing.T, o Options) {
	e := o.New(t)
	e.Inject("check", -1, Status(http.StatusNotFound))
	if s, err := e.New(t, o.fast()); err == nil {
		_ = s.Close()
		t.Error("open a store over a bucket that is not there: no error")
	}
}
