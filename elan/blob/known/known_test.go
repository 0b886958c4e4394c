package known_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/known"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// inside is a store that counts what it is asked about, and removes.
type inside struct {
	*mem.Store
	asked  atomic.Int64 // digests
	calls  atomic.Int64
	before func(ctx context.Context) error // of a FindMissing; nil: nothing
	after  func()                          // of one, before it returns; nil: nothing
}

func (s *inside) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	s.calls.Add(1)
	s.asked.Add(int64(len(ds)))
	if s.before != nil {
		if err := s.before(ctx); err != nil {
			return nil, err
		}
	}
	missing, err := s.Store.FindMissing(ctx, ds)
	if s.after != nil {
		s.after()
	}
	return missing, err
}

func newInside(t testing.TB) *inside {
	t.Helper()
	m, err := mem.New(mem.Options{MaxBytes: 300 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return &inside{Store: m}
}

func newKnown(t testing.TB, o known.Options) blob.Store {
	t.Helper()
	s, err := known.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func wantMissing(t testing.TB, s blob.Store, want bool, ds ...digest.Digest) {
	t.Helper()
	missing, err := s.FindMissing(t.Context(), ds)
	if err != nil || want && len(missing) != len(ds) || !want && len(missing) != 0 {
		t.Errorf("%d of %d missing, error %v; want all of them: %v", len(missing), len(ds), err, want)
	}
}

func TestStore(t *testing.T) {
	blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store {
		return newKnown(t, known.Options{Store: newInside(t)})
	}})
}

func TestStore_asksOnlyAboutTheUnknown(t *testing.T) {
	in := newInside(t)
	s := newKnown(t, known.Options{Store: in})
	var there, absent []digest.Digest
	for i := range 1000 {
		data := fmt.Appendf(nil, "blob %d", i)
		if i%2 == 0 {
			there = append(there, blobtest.Put(t, in, digest.SHA256, data))
		} else {
			absent = append(absent, digest.Of(digest.SHA256, data))
		}
	}
	wantMissing(t, s, false, there...)
	wantMissing(t, s, false, there...)
	if n := in.asked.Load(); n != 500 {
		t.Errorf("the store was asked about %d digests, want 500: the second time all were known", n)
	}
	// What is missing is asked about each time.
	in.asked.Store(0)
	wantMissing(t, s, true, absent...)
	wantMissing(t, s, true, absent...)
	if n := in.asked.Load(); n != 1000 {
		t.Errorf("the store was asked about %d digests, want 2 × 500: absence is not remembered", n)
	}
	// What comes without the decorator's doing is found.
	blobtest.Put(t, in, digest.SHA256, []byte("blob 1"))
	wantMissing(t, s, false, absent[0])
}

func TestStore_knowsWhatItTook(t *testing.T) {
	in := newInside(t)
	s := newKnown(t, known.Options{Store: in})
	d := blobtest.Put(t, s, digest.SHA256, []byte("x"))
	wantMissing(t, s, false, d)
	if n := in.calls.Load(); n != 0 {
		t.Errorf("%d calls about what was just committed, want none", n)
	}
}

func TestStore_window(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newInside(t)
		// The answer takes a minute, which counts.
		in.before = func(context.Context) error { time.Sleep(time.Minute); return nil }
		s := newKnown(t, known.Options{Store: in, Window: 10 * time.Minute})
		d := blobtest.Put(t, in, digest.SHA256, []byte("x"))
		start := time.Now()
		for _, c := range []struct {
			after time.Duration
			calls int64
		}{{0, 1}, {9*time.Minute + 59*time.Second, 1}, {10*time.Minute + time.Second, 2}, {19 * time.Minute, 2}, {22 * time.Minute, 3}} {
			time.Sleep(time.Until(start.Add(c.after)))
			wantMissing(t, s, false, d)
			if n := in.calls.Load(); n != c.calls {
				t.Errorf("after %v: %d calls, want %d", c.after, n, c.calls)
			}
		}
	})
}

// Together with a store that keeps blobs for the window longer, "it is there"
// is true for the promised lifetime, whenever it was said.
func TestStore_lifetime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const promised, window = 80 * time.Minute, 10 * time.Minute
		m, err := mem.New(mem.Options{MaxBytes: 4000, MinLifetime: promised + window})
		if err != nil {
			t.Fatal(err)
		}
		s := newKnown(t, known.Options{Store: m, Window: window})
		d := blobtest.Put(t, s, digest.SHA256, []byte("x"))
		pressure := 0
		press := func() { // evicts all that may go
			for range 20 {
				pressure++
				_ = blob.ReceiveBytes(t.Context(), s, digest.Of(digest.SHA256, fmt.Append(nil, pressure)), fmt.Append(nil, pressure))
			}
		}
		for _, pause := range []time.Duration{9, 9, 30, 79, 8, 9, 79, 79} {
			time.Sleep(pause * time.Minute)
			wantMissing(t, s, false, d)
			time.Sleep(promised)
			press()
			r, err := s.Open(t.Context(), d, 0)
			if err != nil {
				t.Fatalf("%v after it was said to be there: %v", promised, err)
			}
			_ = r.Close()
		}
		time.Sleep(10 * promised)
		press()
		wantMissing(t, s, true, d)
	})
}

func TestStore_forgets(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, s blob.Store, in *inside, d digest.Digest)
	}{
		{"removed", func(t *testing.T, s blob.Store, _ *inside, d digest.Digest) {
			r, ok := blob.As[blob.Remover](s)
			if !ok {
				t.Fatal("the store inside removes, and known does not")
			}
			if err := r.Remove(t.Context(), d); err != nil {
				t.Error(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := newInside(t)
			s := newKnown(t, known.Options{Store: in})
			d := blobtest.Put(t, s, digest.SHA256, []byte("x"))
			c.do(t, s, in, d)
			wantMissing(t, s, true, d)
		})
	}
	fail := errors.New("trouble")
	for _, c := range []struct {
		op      blobtest.Op
		err     error
		forgets bool
	}{
		{blobtest.OpOpen, blob.ErrNotFound, true},
		{blobtest.OpOpen, blob.ErrCorrupt, true},
		{blobtest.OpOpen, blob.ErrUnavailable, false},
		{blobtest.OpRead, blob.ErrNotFound, true},
		{blobtest.OpRead, blob.ErrCorrupt, true},
		{blobtest.OpRead, fail, false},
	} {
		t.Run(fmt.Sprint(c.op, "/", c.err), func(t *testing.T) {
			in := newInside(t)
			s := newKnown(t, known.Options{Store: blobtest.Faulty{Store: in, Fault: func(op blobtest.Op, _ digest.Digest) error {
				if op == c.op {
					return c.err
				}
				return nil
			}}})
			d := blobtest.Put(t, s, digest.SHA256, []byte("x"))
			if _, err := blob.ReadAll(t.Context(), s, d, 10); !errors.Is(err, c.err) {
				t.Errorf("read: %v, want %v", err, c.err)
			}
			wantMissing(t, s, false, d)
			if asked := in.calls.Load() > 0; asked != c.forgets {
				t.Errorf("the store was asked again: %v, want %v", asked, c.forgets)
			}
		})
	}
}

// A blob is removed while the answer that it is there is on its way.
func TestStore_removedMeanwhile(t *testing.T) {
	in := newInside(t)
	s := newKnown(t, known.Options{Store: in})
	d := blobtest.Put(t, in, digest.SHA256, []byte("x"))
	r, _ := blob.As[blob.Remover](s)
	in.after = func() {
		in.after = nil
		if err := r.Remove(t.Context(), d); err != nil {
			t.Error(err)
		}
	}
	wantMissing(t, s, false, d) // true when it was asked
	wantMissing(t, s, true, d)
}

func TestStore_failsAsAWhole(t *testing.T) {
	in := newInside(t)
	s := newKnown(t, known.Options{Store: in})
	d := blobtest.Put(t, s, digest.SHA256, []byte("x"))
	in.before = func(context.Context) error { return blob.ErrUnavailable }
	wantMissing(t, s, false, d) // is known
	if _, err := s.FindMissing(t.Context(), []digest.Digest{d, digest.Of(digest.SHA256, []byte("y"))}); !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("error %v, want ErrUnavailable", err)
	}
}

// Sixteen clients ask the same at once, and the first of them goes away.
func TestStore_sameQuestionOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newInside(t)
		in.before = func(ctx context.Context) error {
			select {
			case <-time.After(time.Second):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		s := newKnown(t, known.Options{Store: in})
		var ds []digest.Digest
		for i := range 100 {
			ds = append(ds, blobtest.Put(t, in, digest.SHA256, fmt.Append(nil, i)))
		}
		absent := digest.Of(digest.SHA256, []byte("absent"))
		ask := func(ctx context.Context) error {
			missing, err := s.FindMissing(ctx, append(ds[:100:100], absent, absent))
			if err == nil && (len(missing) != 1 || missing[0] != absent) {
				t.Errorf("missing %v, want %v", missing, absent)
			}
			return err
		}
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				if err := ask(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		// All digests once, and the one that is missing once by each.
		if n := in.asked.Load(); n != 101+15 {
			t.Errorf("the store was asked about %d digests, want 116", n)
		}

		for i := range ds {
			ds[i] = blobtest.Put(t, in, digest.SHA1, fmt.Append(nil, i))
		}
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			if err := ask(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("error %v, want Canceled", err)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			if err := ask(t.Context()); err != nil {
				t.Errorf("the first to ask went away, and the second got %v", err)
			}
		})
		synctest.Wait()
		cancel()
		wg.Wait()
	})
}

func TestNew(t *testing.T) {
	for name, o := range map[string]known.Options{
		"no store":         {},
		"negative window":  {Store: newInside(t), Window: -1},
		"negative digests": {Store: newInside(t), MaxDigests: -1},
	} {
		if _, err := known.New(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	plain := newKnown(t, known.Options{Store: blobtest.Faulty{Store: struct{ blob.Store }{newInside(t)}}})
	if _, ok := blob.As[blob.Remover](plain); ok {
		t.Error("known removes from a store that can't")
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	s, err := known.New(known.Options{Store: newInside(t), Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("problems %v, error %v", problems, err)
	}
	if len(families) != 1 || families[0].GetName() != "elan_known_answers_total" || len(families[0].Metric) != 2 {
		t.Errorf("metrics %v", families)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if families, err := reg.Gather(); err != nil || len(families) > 0 {
		t.Errorf("%d families are left, error %v", len(families), err)
	}
}

func BenchmarkFindMissing_10000Known(b *testing.B) {
	in := newInside(b)
	s := newKnown(b, known.Options{Store: in})
	ds := make([]digest.Digest, 10_000)
	for i := range ds {
		ds[i] = blobtest.Put(b, s, digest.SHA256, fmt.Append(nil, i))
	}
	b.ReportAllocs()
	for b.Loop() {
		if missing, err := s.FindMissing(b.Context(), ds); len(missing) > 0 || err != nil {
			b.Fatal(len(missing), err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(ds)), "ns/digest")
}
