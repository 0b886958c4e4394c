package mem_test

import (
	"errors"
	"fmt"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

func open(t testing.TB, o mem.Options) *mem.Store {
	t.Helper()
	s, err := mem.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func options() blobtest.Options {
	return blobtest.Options{New: func(t testing.TB) blob.Store {
		return open(t, mem.Options{MaxBytes: 512 << 20, MinLifetime: time.Nanosecond})
	}}
}

func TestStore(t *testing.T) {
	o := options()
	o.New = func(t testing.TB) blob.Store { return open(t, mem.Options{}) }
	blobtest.Run(t, o)
}

func BenchmarkStore(b *testing.B) {
	b.Run("mem", func(b *testing.B) { blobtest.Bench(b, options()) })
}

func TestNew_refuses(t *testing.T) {
	for _, o := range []mem.Options{{MaxBytes: -1}, {MinLifetime: -1}} {
		if _, err := mem.New(o); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
}

func put(t testing.TB, s blob.Creator, i int) (digest.Digest, error) {
	t.Helper()
	return blob.PutBytes(t.Context(), s, digest.SHA256, blobtest.Random(uint64(i), 1<<10))
}

func missing(t testing.TB, s blob.Finder, ds ...digest.Digest) int {
	t.Helper()
	m, err := s.FindMissing(t.Context(), ds)
	if err != nil {
		t.Fatal(err)
	}
	return len(m)
}

func TestStore_lifetime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, mem.Options{MaxBytes: 10 * (1<<10 + 256), MinLifetime: time.Hour})
		var ds []digest.Digest
		for i := range 10 {
			d, err := put(t, s, i)
			if err != nil {
				t.Fatal(err)
			}
			ds = append(ds, d)
		}
		if _, err := put(t, s, 10); !errors.Is(err, blob.ErrFull) {
			t.Fatalf("one too many: %v, want ErrFull", err)
		}
		if _, err := blob.PutBytes(t.Context(), s, digest.SHA256, make([]byte, 100_000)); !errors.Is(err, blob.ErrTooLarge) {
			t.Fatalf("larger than the store: %v, want ErrTooLarge", err)
		}
		time.Sleep(time.Hour)
		// The oldest are used again, each in its way, and so no longer the first to go.
		if missing(t, s, ds[0]) != 0 {
			t.Fatal("evicted too early")
		}
		if _, err := blob.ReadAll(t.Context(), s, ds[1], 1<<20); err != nil {
			t.Fatal(err)
		}
		if _, err := put(t, s, 2); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Nanosecond)
		for i := range 7 {
			if _, err := put(t, s, 20+i); err != nil {
				t.Fatalf("put %d: %v", i, err)
			}
		}
		if n := missing(t, s, ds[:3]...); n != 0 {
			t.Errorf("%d that were used are gone", n)
		}
		if n := missing(t, s, ds[3:]...); n != 7 {
			t.Errorf("%d that were not used are gone, want 7", n)
		}
		if _, err := put(t, s, 30); !errors.Is(err, blob.ErrFull) {
			t.Errorf("all are young: %v, want ErrFull", err)
		}
	})
}

func TestStore_abandonedWritersFreeTheirSpace(t *testing.T) {
	s := open(t, mem.Options{MaxBytes: 3000})
	for i := range 100 {
		d := digest.Of(digest.SHA256, fmt.Appendf(make([]byte, 2000), "%d", i))
		w, err := s.Create(t.Context(), d)
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		if _, err := s.Create(t.Context(), d); !errors.Is(err, blob.ErrFull) {
			t.Fatalf("a second one beside it: %v, want ErrFull", err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStore_metrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewPedanticRegistry()
		s := open(t, mem.Options{MaxBytes: 2 * (1<<10 + 256), MinLifetime: time.Hour, Registerer: reg})
		want := func(name string, value float64) {
			t.Helper()
			families, err := reg.Gather()
			if err != nil {
				t.Fatal(err)
			}
			problems, err := promlint.NewWithMetricFamilies(families).Lint()
			if err != nil || len(problems) > 0 {
				t.Errorf("promlint: %v, %v", problems, err)
			}
			for _, f := range families {
				if f.GetName() == "elan_mem_store_"+name {
					m := f.GetMetric()[0]
					if got := m.GetCounter().GetValue() + m.GetGauge().GetValue(); got != value {
						t.Errorf("%s is %v, want %v", name, got, value)
					}
					return
				}
			}
			t.Errorf("no metric %s", name)
		}
		for i := range 2 {
			if _, err := put(t, s, i); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Minute)
		}
		if err := s.Full(); err != nil {
			t.Errorf("full though nothing was refused: %v", err)
		}
		want("youngest_evicted_age_seconds", math.Inf(1))
		if _, err := put(t, s, 2); !errors.Is(err, blob.ErrFull) {
			t.Fatalf("put: %v, want ErrFull", err)
		}
		if err := s.Full(); !errors.Is(err, blob.ErrFull) {
			t.Errorf("full: %v, want ErrFull", err)
		}
		time.Sleep(blob.FullFor + 1)
		if err := s.Full(); err != nil {
			t.Errorf("full, long after: %v", err)
		}
		time.Sleep(time.Hour)
		if _, err := put(t, s, 2); err != nil {
			t.Fatal(err)
		}
		want("refused_total", 1)
		want("evicted_total", 1)
		want("evicted_bytes_total", 1<<10+256)
		want("used_bytes", 2*(1<<10+256))
		want("max_bytes", 2*(1<<10+256))
		want("min_lifetime_seconds", 3600)
		want("youngest_evicted_age_seconds", (80*time.Minute + blob.FullFor + 1).Seconds())
		if err := errors.Join(s.Close(), s.Close()); err != nil {
			t.Error(err)
		}
		if left, err := reg.Gather(); err != nil || len(left) > 0 {
			t.Errorf("%d metrics left after Close, %v", len(left), err)
		}
	})
}

// TestStore_chaos: the lifetime contract holds under constant pressure.
func TestStore_chaos(t *testing.T) {
	const lifetime = 600 * time.Millisecond
	blobtest.Chaos(t, blobtest.ChaosOptions{Store: open(t, mem.Options{MaxBytes: 8 << 20, MinLifetime: lifetime}), Lifetime: lifetime})
}
