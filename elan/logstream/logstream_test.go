package logstream_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/elan/logstream"
	"github.com/mettle-build/mettle/elan/resource"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newStreams(t testing.TB, o logstream.Options) *logstream.Streams {
	t.Helper()
	s, err := logstream.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	return s
}

func create(t testing.TB, s *logstream.Streams) (name, writeName string) {
	t.Helper()
	name, writeName, err := s.Create(t.Context(), "i/j")
	if err != nil {
		t.Fatal(err)
	}
	return name, writeName
}

func mustAppend(t testing.TB, s *logstream.Streams, writeName string, offset int64, data string) {
	t.Helper()
	if n, err := s.Append(t.Context(), writeName, offset, []byte(data)); err != nil || n != offset+int64(len(data)) {
		t.Fatalf("Append at %d: %d, %v", offset, n, err)
	}
}

// readAll reads to the end, and returns its error where that is not the usual one.
func readAll(ctx context.Context, s *logstream.Streams, name string, offset int64) (string, error) {
	r, err := s.Open(name, offset)
	if err != nil {
		return "", err
	}
	var all bytes.Buffer
	p := make([]byte, 1000)
	for {
		n, err := r.Read(ctx, p)
		all.Write(p[:n])
		if errors.Is(err, io.EOF) {
			return all.String(), nil
		}
		if err != nil {
			return all.String(), err
		}
	}
}

// Readers get everything, from wherever they begin, whenever they come.
func TestStreams_readers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStreams(t, logstream.Options{})
		name, writeName := create(t, s)
		want := strings.Repeat("0123456789", 10_000) // more than two chunks
		var wg sync.WaitGroup
		for _, offset := range []int64{0, 7, 50_000, 99_999, 100_000} {
			wg.Go(func() {
				if got, err := readAll(t.Context(), s, name, offset); err != nil || got != want[offset:] {
					t.Errorf("from %d: %d bytes, %v; want %d", offset, len(got), err, len(want[offset:]))
				}
			})
		}
		synctest.Wait()
		for i := 0; i < len(want); i += 997 {
			mustAppend(t, s, writeName, int64(i), want[i:min(i+997, len(want))])
			if i%3 == 0 {
				synctest.Wait() // they have read all that there is, and wait
			}
		}
		if n, ended, err := s.Status(t.Context(), writeName); n != 100_000 || ended || err != nil {
			t.Errorf("Status: %d, %v, %v", n, ended, err)
		}
		for range 2 { // the answer to the first may have been lost
			if err := s.Finish(t.Context(), writeName, 100_000); err != nil {
				t.Errorf("Finish: %v", err)
			}
		}
		wg.Wait()
		if got, err := readAll(t.Context(), s, name, 3); err != nil || got != want[3:] {
			t.Errorf("a late reader: %d bytes, %v", len(got), err)
		}
		if _, err := readAll(t.Context(), s, name, 100_001); !errors.Is(err, logstream.ErrOffset) {
			t.Errorf("from behind the end: %v, want ErrOffset", err)
		}
	})
}

// The two names are for one use each, and say nothing else.
func TestStreams_names(t *testing.T) {
	s := newStreams(t, logstream.Options{})
	name, writeName := create(t, s)
	n, ok := resource.ParseLogStream(name)
	if !ok || n.Parent != "i/j" || !strings.HasPrefix(writeName, name+"/") {
		t.Fatalf("names %q and %q", name, writeName)
	}
	other, otherWrite := create(t, s)
	if other == name || otherWrite == writeName {
		t.Error("names come twice")
	}
	wrongToken := name + otherWrite[strings.LastIndexByte(otherWrite, '/'):]
	for _, tc := range []struct {
		what, name string
		read       bool
		want       error
	}{
		{"reading by the writer's name", writeName, true, logstream.ErrInvalid},
		{"writing by the readers' name", name, false, logstream.ErrInvalid},
		{"no name", "i/j/logstreams/", true, logstream.ErrInvalid},
		{"another instance", strings.TrimPrefix(name, "i/"), true, logstream.ErrNotFound},
		{"a wrong token", wrongToken, false, logstream.ErrNotFound},
		{"another server", "i/j/logstreams/AAAAAAAA-" + n.ID[9:], true, logstream.ErrElsewhere},
		{"an old one", "i/j/logstreams/" + n.ID[:9] + "AAAA", true, logstream.ErrNotFound},
	} {
		var err error
		if tc.read {
			_, err = s.Open(tc.name, 0)
		} else {
			_, err = s.Append(t.Context(), tc.name, 0, []byte("x"))
		}
		if !errors.Is(err, tc.want) || errors.Is(err, logstream.ErrElsewhere) != (tc.want == logstream.ErrElsewhere) { //nolint:errorlint // of the table
			t.Errorf("%s: %v, want %v", tc.what, err, tc.want)
		}
	}
	if _, _, err := s.Create(t.Context(), "a/blobs"); !errors.Is(err, resource.ErrInvalid) {
		t.Errorf("an instance with a reserved word: %v", err)
	}
}

func TestStreams_writing(t *testing.T) {
	s := newStreams(t, logstream.Options{MaxStreamBytes: 10})
	name, w := create(t, s)
	mustAppend(t, s, w, 0, "12345")
	for _, offset := range []int64{0, 4, 6, -1} {
		if n, err := s.Append(t.Context(), w, offset, []byte("x")); !errors.Is(err, logstream.ErrOffset) || n != 5 {
			t.Errorf("Append at %d: %d, %v, want 5 and ErrOffset", offset, n, err)
		}
	}
	if err := s.Finish(t.Context(), w, 4); !errors.Is(err, logstream.ErrOffset) {
		t.Errorf("Finish at 4: %v", err)
	}
	if n, err := s.Append(t.Context(), w, 5, []byte("678901")); !errors.Is(err, logstream.ErrFull) || n != 5 {
		t.Errorf("Append beyond the limit: %d, %v", n, err)
	}
	// It has ended, and its readers learn why.
	if got, err := readAll(t.Context(), s, name, 0); got != "12345" || !errors.Is(err, logstream.ErrFull) {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := s.Append(t.Context(), w, 5, []byte("6")); !errors.Is(err, logstream.ErrFull) {
		t.Errorf("Append after that: %v", err)
	}
	_, w = create(t, s)
	if err := s.Finish(t.Context(), w, 0); err != nil {
		t.Error(err)
	}
	if _, err := s.Append(t.Context(), w, 0, []byte("6")); !errors.Is(err, logstream.ErrFinished) {
		t.Errorf("Append after the end: %v", err)
	}
}

// What has ended goes after a while.
func TestStreams_expire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStreams(t, logstream.Options{Keep: time.Hour})
		name, w := create(t, s)
		mustAppend(t, s, w, 0, "x")
		if err := s.Finish(t.Context(), w, 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour - time.Second)
		if got, err := readAll(t.Context(), s, name, 0); got != "x" || err != nil {
			t.Errorf("before its time: %q, %v", got, err)
		}
		time.Sleep(2 * time.Second)
		if _, err := s.Open(name, 0); !errors.Is(err, logstream.ErrNotFound) || errors.Is(err, logstream.ErrElsewhere) {
			t.Errorf("after its time: %v", err)
		}
	})
}

// A writer that is gone is no end, and one that is silent is not gone.
func TestStreams_writerGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStreams(t, logstream.Options{WriterTimeout: time.Minute})
		name, w := create(t, s)
		mustAppend(t, s, w, 0, "there was this")
		for range 5 {
			time.Sleep(50 * time.Second)
			mustAppend(t, s, w, 14, "")
		}
		release, err := s.Hold(w)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		release()
		time.Sleep(59 * time.Second)
		mustAppend(t, s, w, 14, "!")
		begin := time.Now()
		got, err := readAll(t.Context(), s, name, 0)
		if got != "there was this!" || !errors.Is(err, logstream.ErrAborted) {
			t.Errorf("read %q, %v", got, err)
		}
		if waited := time.Since(begin); waited != time.Minute {
			t.Errorf("that took %v, want a minute", waited)
		}
	})
}

// What has ended makes room for what is new, and what has not does not.
func TestStreams_bounded(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := newStreams(t, logstream.Options{MaxBytes: 100, MaxStreams: 3, Registerer: reg})
	text := strings.Repeat("x", 40)
	var names, writers [4]string
	for i := range 3 {
		names[i], writers[i] = create(t, s)
	}
	if _, _, err := s.Create(t.Context(), ""); !errors.Is(err, logstream.ErrFull) {
		t.Fatalf("a stream too many: %v", err)
	}
	mustAppend(t, s, writers[0], 0, text)
	mustAppend(t, s, writers[1], 0, text)
	if _, err := s.Append(t.Context(), writers[2], 0, []byte(text)); !errors.Is(err, logstream.ErrFull) {
		t.Fatalf("bytes too many: %v", err)
	}
	slow, err := s.Open(names[0], 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Finish(t.Context(), writers[0], 40); err != nil {
		t.Fatal(err)
	}
	// The third has ended first, and makes room for a stream; the first, for bytes.
	names[3], writers[3] = create(t, s)
	mustAppend(t, s, writers[3], 0, text[:20])
	if got, err := readAll(t.Context(), s, names[0], 0); got != text || err != nil {
		t.Errorf("the first while there is room: %q, %v", got, err)
	}
	mustAppend(t, s, writers[1], 40, text[:1])
	if _, err := slow.Read(t.Context(), make([]byte, 10)); !errors.Is(err, logstream.ErrNotFound) {
		t.Errorf("a reader of the first, which is no more: %v", err)
	}
	if got, want := testutil.CollectAndCount(reg), 7; got != want {
		t.Errorf("%d series, want %d", got, want)
	}
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
	for _, m := range []struct {
		name string
		want float64
	}{{"elan_logstreams_size_bytes", 61}, {"elan_logstreams_open", 2}, {"elan_logstreams_kept", 0}} {
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == m.name && f.GetMetric()[0].GetGauge().GetValue() != m.want {
				t.Errorf("%s is %v, want %v", m.name, f.GetMetric()[0].GetGauge().GetValue(), m.want)
			}
		}
	}
}

// At the end of the server nobody goes on waiting.
func TestStreams_shutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStreams(t, logstream.Options{})
		name, w := create(t, s)
		ended := make(chan error, 1)
		go func() {
			_, err := readAll(t.Context(), s, name, 0)
			ended <- err
		}()
		synctest.Wait()
		s.Shutdown()
		s.Shutdown()
		if err := <-ended; !errors.Is(err, logstream.ErrClosed) {
			t.Errorf("the reader: %v", err)
		}
		if _, err := s.Append(t.Context(), w, 0, []byte("x")); !errors.Is(err, logstream.ErrClosed) {
			t.Errorf("the writer: %v", err)
		}
		if _, _, err := s.Create(t.Context(), ""); !errors.Is(err, logstream.ErrClosed) {
			t.Errorf("another one: %v", err)
		}
	})
}

func TestReader_Read_contextDone(t *testing.T) {
	s := newStreams(t, logstream.Options{})
	name, _ := create(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := readAll(ctx, s, name, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("Read: %v", err)
	}
}

// Many at once, for the race detector.
func TestStreams_concurrently(t *testing.T) {
	s := newStreams(t, logstream.Options{MaxBytes: 20_000, MaxStreams: 12, Keep: time.Millisecond})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				name, w, err := s.Create(t.Context(), "")
				if err != nil {
					t.Error(err)
					return
				}
				var readers sync.WaitGroup
				readers.Go(func() {
					got, err := readAll(t.Context(), s, name, 0)
					if err == nil && len(got) != 2000 {
						t.Errorf("%d bytes", len(got))
					}
				})
				for i := range int64(20) {
					if _, err := s.Append(t.Context(), w, i*100, make([]byte, 100)); err != nil {
						t.Error(err)
					}
				}
				if err := s.Finish(t.Context(), w, 2000); err != nil && !errors.Is(err, logstream.ErrNotFound) {
					t.Error(err)
				}
				readers.Wait()
			}
		})
	}
	wg.Wait()
}

func BenchmarkStreams_Append(b *testing.B) {
	s := newStreams(b, logstream.Options{MaxStreamBytes: 1 << 40, MaxBytes: 1 << 40})
	data := make([]byte, 4096)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		_, w, err := s.Create(b.Context(), "")
		if err != nil {
			b.Fatal(err)
		}
		if _, err := s.Append(b.Context(), w, 0, data); err != nil {
			b.Fatal(err)
		}
		if err := s.Finish(b.Context(), w, int64(len(data))); err != nil {
			b.Fatal(err)
		}
	}
}

// One owner may not have all streams, and has room again when one of its ends.
func TestStreams_CreateFor_share(t *testing.T) {
	s, err := logstream.New(logstream.Options{MaxStreams: 6})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	var last string
	for range 3 {
		if _, last, err = s.CreateFor(t.Context(), "greedy", "i"); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := s.CreateFor(t.Context(), "greedy", "i"); !errors.Is(err, logstream.ErrFull) {
		t.Errorf("the fourth of six: %v, want ErrFull", err)
	}
	if _, _, err := s.CreateFor(t.Context(), "other", "i"); err != nil {
		t.Errorf("another's first: %v", err)
	}
	if err := s.Finish(t.Context(), last, 0); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.CreateFor(t.Context(), "greedy", "i"); err != nil {
		t.Errorf("one more when one has ended: %v", err)
	}
	if _, _, err := s.Create(t.Context(), "i"); err != nil {
		t.Errorf("one of nobody's: %v", err)
	}
}
