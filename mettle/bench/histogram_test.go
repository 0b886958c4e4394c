package bench

import (
	"math"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestHistogram_quantile_withinResolution(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		vs := rapid.SliceOfN(rapid.Int64Range(0, int64(time.Hour)), 1, 200).Draw(t, "latencies")
		q := rapid.Float64Range(0, 1).Draw(t, "q")
		var a, b histogram
		for i, v := range vs {
			[]*histogram{&a, &b}[i%2].add(time.Duration(v))
		}
		a.merge(&b)
		slices.Sort(vs)
		want := vs[max(int(math.Ceil(q*float64(len(vs))))-1, 0)]
		got := int64(a.quantile(q))
		if diff := max(got-want, want-got); diff > want/128 {
			t.Fatalf("quantile %v of %v is %d, want %d within 1/128", q, vs, got, want)
		}
		if a.max != time.Duration(vs[len(vs)-1]) || a.n != uint64(len(vs)) {
			t.Fatalf("max %v of %d, want %v of %d", a.max, a.n, vs[len(vs)-1], len(vs))
		}
	})
}

func TestHistogram_quantile_exact(t *testing.T) {
	var h histogram
	if got := h.quantile(0.5); got != 0 {
		t.Errorf("median of nothing is %v, want 0", got)
	}
	for v := range time.Duration(100) {
		h.add(v + 1)
	}
	for _, tc := range []struct {
		q    float64
		want time.Duration
	}{{0, 1}, {0.5, 50}, {0.9, 90}, {0.99, 99}, {0.999, 100}, {1, 100}} {
		if got := h.quantile(tc.q); got != tc.want {
			t.Errorf("quantile %v is %d, want %d", tc.q, got, tc.want)
		}
	}
}

func TestHistogram_takesExtremes(t *testing.T) {
	var h histogram
	h.add(-1)
	h.add(math.MaxInt64)
	if got := h.quantile(1); got < math.MaxInt64/128*127 {
		t.Errorf("quantile 1 is %d, want the greatest latency", got)
	}
	if got := h.quantile(0.5); got != 0 {
		t.Errorf("median is %d, want 0: a clock that went back counts as no time", got)
	}
}

func TestMedian(t *testing.T) {
	for _, tc := range []struct {
		name string
		vs   []float64
		want float64
	}{
		{"none", nil, 0},
		{"one", []float64{3}, 3},
		{"odd", []float64{1, 2, 9}, 2},
		{"even", []float64{1, 2, 4, 9}, 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := median(tc.vs); got != tc.want {
				t.Errorf("median of %v is %v, want %v", tc.vs, got, tc.want)
			}
		})
	}
}

func BenchmarkHistogram_add(b *testing.B) {
	var h histogram
	b.ReportAllocs()
	for b.Loop() {
		h.add(1234567)
	}
}
