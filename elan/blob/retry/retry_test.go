package retry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/blob/retry"
	"github.com/mettle-build/mettle/elan/digest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Action caches can be tried again as they are.
var (
	_ action.Getter     = (*retry.Actions)(nil)
	_ action.Putter     = (*retry.Actions)(nil)
	_ retry.ActionCache = (*action.Cache)(nil)
)

func newMem(t testing.TB) *mem.Store {
	t.Helper()
	s, err := mem.New(mem.Options{MaxBytes: 512 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newRetrier(t testing.TB, o retry.Options) *retry.Retrier {
	t.Helper()
	r, err := retry.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// both is a store with entries.
type both struct {
	blob.Store
	blob.Entries
}

func (b both) Unwrap() blob.Store { return b.Store }

// over is what tries again over a store that fails as fault says.
func over(t testing.TB, fault blobtest.Fault) blob.Store {
	t.Helper()
	m, r := newMem(t), newRetrier(t, retry.Options{KeepBytes: 2 << 20})
	return both{
		r.Store(blobtest.Faulty{Store: m, Fault: fault}),
		r.Entries(blobtest.FaultyEntries{Entries: m, Fault: fault}),
	}
}

func TestStore(t *testing.T) {
	t.Run("sound", func(t *testing.T) {
		blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store {
			m, r := newMem(t), newRetrier(t, retry.Options{})
			return both{r.Store(m), r.Entries(m)}
		}})
	})
	// Each 23rd call fails, of readers and writers too.
	t.Run("flaky", func(t *testing.T) {
		blobtest.Run(t, blobtest.Options{FindDigests: 1000, LargeBytes: 1 << 20, New: func(t testing.TB) blob.Store {
			var mu sync.Mutex
			n := 0
			return over(t, func(op blobtest.Op, _ digest.Digest) error {
				mu.Lock()
				defer mu.Unlock()
				if n++; n%23 == 0 && op != blobtest.OpFind {
					return fmt.Errorf("the 23rd: %w", blob.ErrUnavailable)
				}
				return nil
			})
		}})
	})
}

// outage is a fault for a time.
type outage struct {
	until time.Time
	err   error
	calls int
}

func (o *outage) fault(blobtest.Op, digest.Digest) error {
	if time.Now().Before(o.until) {
		o.calls++
		return o.err
	}
	return nil
}

func TestStore_waitsForAnOutage(t *testing.T) {
	data := blobtest.Random(1, 100_000)
	d := digest.Of(digest.SHA256, data)
	key := blob.EntryKey{Action: d}
	for _, tc := range []struct {
		name string
		use  func(ctx context.Context, s blob.Store) error
	}{
		{"find", func(ctx context.Context, s blob.Store) error {
			missing, err := s.FindMissing(ctx, []digest.Digest{d})
			if err == nil && len(missing) > 0 {
				return errors.New("it is missing")
			}
			return err
		}},
		{"read", func(ctx context.Context, s blob.Store) error {
			got, err := blob.ReadAll(ctx, s, d, d.Size())
			if err == nil && !bytes.Equal(got, data) {
				return errors.New("other bytes")
			}
			return err
		}},
		{"write", func(ctx context.Context, s blob.Store) error { return blob.Receive(ctx, s, d, bytes.NewReader(data)) }},
		{"write whole", func(ctx context.Context, s blob.Store) error { return blob.ReceiveBytes(ctx, s, d, data) }},
		{"entry", func(ctx context.Context, s blob.Store) error { _, err := s.(both).Entry(ctx, key); return err }},
		{"put entry", func(ctx context.Context, s blob.Store) error { return s.(both).PutEntry(ctx, key, data) }},
		{"delete entry", func(ctx context.Context, s blob.Store) error { return s.(both).DeleteEntry(ctx, key) }},
		{"repeat", func(ctx context.Context, s blob.Store) error {
			return blob.Repeat(ctx, s, func(ctx context.Context) error { _, err := s.FindMissing(ctx, []digest.Digest{d}); return err })
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := &outage{err: blob.ErrUnavailable}
				s := over(t, o.fault)
				blobtest.Put(t, s, digest.SHA256, data)
				if err := s.(both).PutEntry(t.Context(), key, data); err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				o.until = start.Add(90 * time.Second)
				if err := tc.use(t.Context(), s); err != nil {
					t.Errorf("an outage of 90 s: %v", err)
				}
				if took := time.Since(start); took < 90*time.Second || took > 93*time.Second {
					t.Errorf("an outage of 90 s took %v", took)
				}
				if o.calls > 150 {
					t.Errorf("%d calls within 90 s: it is no load to call less", o.calls)
				}
				start = time.Now()
				o.until = start.Add(time.Hour)
				if err := tc.use(t.Context(), s); !errors.Is(err, blob.ErrUnavailable) {
					t.Errorf("an outage of an hour: %v, want ErrUnavailable", err)
				}
				if took := time.Since(start); took > 121*time.Second {
					t.Errorf("given up after %v only", took)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				start = time.Now()
				if err := tc.use(ctx, s); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("with 5 s: %v, want DeadlineExceeded", err)
				}
				if took := time.Since(start); took != 5*time.Second {
					t.Errorf("with 5 s it took %v", took)
				}
				o.err = fmt.Errorf("something else: %w", blob.ErrFull)
				start = time.Now()
				if err := tc.use(t.Context(), s); !errors.Is(err, blob.ErrFull) {
					t.Errorf("another error: %v, want it", err)
				}
				if took := time.Since(start); took != 0 {
					t.Errorf("another error was tried again for %v", took)
				}
			})
		})
	}
}

// TestStore_leftAlone: a store that says when to come again is not asked sooner, and
// one that is full not again.
func TestStore_leftAlone(t *testing.T) {
	data := []byte("x")
	d := digest.Of(digest.SHA256, data)
	for _, tc := range []struct {
		name   string
		after  time.Duration
		lasts  time.Duration
		calls  [2]int // at least, at most, while it refuses
		failed bool
		took   [2]time.Duration
	}{
		{"for a while", 5 * time.Second, 12 * time.Second, [2]int{2, 3}, false, [2]time.Duration{12 * time.Second, 18 * time.Second}},
		{"for less than a pause", time.Millisecond, 12 * time.Second, [2]int{8, 24}, false, [2]time.Duration{12 * time.Second, 14 * time.Second}},
		{"for as long as there is patience", 5 * time.Second, time.Hour, [2]int{18, 25}, true, [2]time.Duration{110 * time.Second, 2 * time.Minute}},
		{"for longer than there is patience", time.Hour, time.Hour, [2]int{1, 1}, true, [2]time.Duration{0, 0}},
		{"for ever", math.MaxInt64, time.Hour, [2]int{1, 1}, true, [2]time.Duration{0, 0}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := &outage{until: time.Now().Add(tc.lasts), err: fmt.Errorf("x: %w", &blob.BusyError{Reason: "not so fast", After: tc.after})}
				s := over(t, o.fault)
				start := time.Now()
				err := blob.ReceiveBytes(t.Context(), s, d, data)
				if tc.failed && (!errors.Is(err, blob.ErrUnavailable) || errors.Is(err, blob.ErrFull)) || !tc.failed && err != nil {
					t.Errorf("%v, want it to fail: %v", err, tc.failed)
				}
				if took := time.Since(start); took < tc.took[0] || took > tc.took[1] {
					t.Errorf("it took %v, want %v to %v", took, tc.took[0], tc.took[1])
				}
				if o.calls < tc.calls[0] || o.calls > tc.calls[1] {
					t.Errorf("%d calls, want %d to %d", o.calls, tc.calls[0], tc.calls[1])
				}
			})
		})
	}
}

// TestStore_readerGoesOn: a reader that breaks off again and again brings each
// byte once, by both of its ways.
func TestStore_readerGoesOn(t *testing.T) {
	data := blobtest.Random(2, 300_000)
	for _, tc := range []struct {
		name string
		read func(r io.Reader) ([]byte, error)
	}{
		{"read", io.ReadAll},
		{"write to", func(r io.Reader) ([]byte, error) {
			var b bytes.Buffer
			_, err := r.(io.WriterTo).WriteTo(&b)
			return b.Bytes(), err
		}},
	} {
		for _, offset := range []int64{0, 1234, 300_000} {
			t.Run(fmt.Sprintf("%s from %d", tc.name, offset), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := newMem(t)
					d := blobtest.Put(t, m, digest.SHA256, data)
					s := newRetrier(t, retry.Options{}).Store(&breaking{Store: m, after: 10_000})
					r, err := s.Open(t.Context(), d, offset)
					if err != nil {
						t.Fatal(err)
					}
					got, err := tc.read(r)
					if err != nil || !bytes.Equal(got, data[offset:]) {
						t.Errorf("%d bytes, %v; want %d", len(got), err, len(data[offset:]))
					}
					if err := errors.Join(r.Close(), r.Close()); err != nil {
						t.Errorf("close twice: %v", err)
					}
				})
			})
		}
	}
}

// breaking is a store whose readers break off after some bytes.
type breaking struct {
	blob.Store
	after int64
	lasts time.Duration // what it takes to get there
}

func (b *breaking) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := b.Store.Open(ctx, d, offset)
	if err != nil {
		return nil, err
	}
	return &breakingReader{r, b.after, b.lasts}, nil
}

type breakingReader struct {
	io.ReadCloser
	left  int64
	lasts time.Duration
}

func (r *breakingReader) Read(p []byte) (int, error) {
	if r.left == 0 {
		time.Sleep(r.lasts)
		return 0, fmt.Errorf("it broke off: %w", blob.ErrUnavailable)
	}
	n, err := r.ReadCloser.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	return n, err
}

// TestStore_readerBreaksOffLate: a reader of a large blob has Options.For for each
// time that it breaks off, not for all of them.
func TestStore_readerBreaksOffLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMem(t)
		data := blobtest.Random(4, 100_000)
		d := blobtest.Put(t, m, digest.SHA256, data)
		slow := &breaking{Store: m, after: 20_000, lasts: time.Minute}
		r, err := newRetrier(t, retry.Options{For: 90 * time.Second}).Store(slow).Open(t.Context(), d, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		var b bytes.Buffer
		if _, err := r.(io.WriterTo).WriteTo(&b); err != nil || !bytes.Equal(b.Bytes(), data) {
			t.Errorf("%d bytes, %v; want %d", b.Len(), err, len(data))
		}
	})
}

// TestStore_writersErrorIsItsOwn: an error of the one who is written to is not the store's.
func TestStore_writersErrorIsItsOwn(t *testing.T) {
	m := newMem(t)
	d := blobtest.Put(t, m, digest.SHA256, blobtest.Random(3, 1000))
	r, err := newRetrier(t, retry.Options{}).Store(m).Open(t.Context(), d, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.Copy(failing{}, r); !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("copy to a writer that fails: %v, want its error", err)
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, blob.ErrUnavailable }

// TestStore_largeWrite: what is not kept fails, and blob.Repeat makes up for it.
func TestStore_largeWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		data := blobtest.Random(4, 100_000)
		d := digest.Of(digest.SHA256, data)
		m := newMem(t)
		fails := 0
		s := newRetrier(t, retry.Options{KeepBytes: 50_000}).Store(blobtest.Faulty{Store: m, Fault: func(op blobtest.Op, _ digest.Digest) error {
			if op == blobtest.OpCommit && fails > 0 {
				fails--
				return blob.ErrUnavailable
			}
			return nil
		}})
		fails = 1
		if err := blob.Receive(t.Context(), s, d, bytes.NewReader(data)); !errors.Is(err, blob.ErrUnavailable) {
			t.Errorf("a large write whose commit fails: %v, want ErrUnavailable", err)
		}
		fails = 3
		err := blob.Repeat(t.Context(), s, func(ctx context.Context) error { return blob.Receive(ctx, s, d, bytes.NewReader(data)) })
		if err != nil || fails != 0 {
			t.Errorf("with Repeat: %v, %d failures to come", err, fails)
		}
	})
}

// TestActions: the results of actions are waited for as well.
func TestActions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewPedanticRegistry()
		r := newRetrier(t, retry.Options{Registerer: reg})
		inside := &fakeActions{fails: 3}
		a := r.Actions(inside)
		if err := a.Put(t.Context(), blob.EntryKey{}, &repb.ActionResult{}); err != nil || inside.puts != 1 {
			t.Errorf("put: %v, %d puts", err, inside.puts)
		}
		inside.fails = 2
		if got, err := a.Get(t.Context(), blob.EntryKey{}); err != nil || got == nil {
			t.Errorf("get: %v, %v", got, err)
		}
		if r.Waiting() != 0 {
			t.Errorf("%d calls wait", r.Waiting())
		}
		if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
			t.Errorf("promlint: %v, %v", problems, err)
		}
		if n, err := testutil.GatherAndCount(reg); err != nil || n != 3 {
			t.Errorf("%d metrics, %v", n, err)
		}
	})
}

type fakeActions struct{ fails, puts int }

func (f *fakeActions) fail() error {
	if f.fails > 0 {
		f.fails--
		return blob.ErrUnavailable
	}
	return nil
}

func (f *fakeActions) Get(context.Context, blob.EntryKey) (*repb.ActionResult, error) {
	return &repb.ActionResult{}, f.fail()
}

func (f *fakeActions) Put(context.Context, blob.EntryKey, *repb.ActionResult) error {
	err := f.fail()
	if err == nil {
		f.puts++
	}
	return err
}

func TestNew_refuses(t *testing.T) {
	for name, o := range map[string]retry.Options{"for": {For: -1}, "keep": {KeepBytes: -1}} {
		if _, err := retry.New(o); err == nil {
			t.Errorf("%s below 0: no error", name)
		}
	}
	reg := prometheus.NewRegistry()
	newRetrier(t, retry.Options{Registerer: reg})
	if _, err := retry.New(retry.Options{Registerer: reg}); err == nil {
		t.Error("metrics that are there already: no error")
	}
}
