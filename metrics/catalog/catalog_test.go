package catalog_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/metrics"
	"github.com/mettle-build/mettle/metrics/catalog"
)

// registry has metrics of every kind, none of which has been used.
func registry() *prometheus.Registry {
	r := metrics.NewRegistry()
	r.MustRegister(
		prometheus.NewCounterVec(prometheus.CounterOpts{Name: "x_calls_total", Help: `Calls, "all" of them, by a|b.`}, []string{"method", "code"}),
		prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "x_call_seconds", Help: "Time."}, []string{"method"}),
		prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "x_info", Help: "Kind.", ConstLabels: prometheus.Labels{"kind": "k"}}, []string{"of"}),
		prometheus.NewGauge(prometheus.GaugeOpts{Name: "x_bytes", Help: "Size."}),
		prometheus.NewHistogram(prometheus.HistogramOpts{Name: "x_wait_seconds", Help: "Wait."}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "x_total", Help: "Number."}, func() float64 { return 0 }),
	)
	return r
}

func TestOf(t *testing.T) {
	got, err := catalog.Of("x", registry())
	if err != nil {
		t.Fatal(err)
	}
	from := []string{"x"}
	want := []catalog.Metric{
		{Name: "x_bytes", Type: "gauge", Help: "Size.", From: from},
		{Name: "x_call_seconds", Type: "histogram", Help: "Time.", Labels: []string{"method"}, From: from},
		{Name: "x_calls_total", Type: "counter", Help: `Calls, "all" of them, by a|b.`, Labels: []string{"method", "code"}, From: from},
		{Name: "x_info", Type: "gauge", Help: "Kind.", Labels: []string{"kind", "of"}, From: from},
		{Name: "x_total", Type: "counter", Help: "Number.", From: from},
		{Name: "x_wait_seconds", Type: "histogram", Help: "Wait.", From: from},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if d := cmp.Diff(want, catalog.ParseMarkdown("# Metrics\n\n"+catalog.Markdown(got)+"\nMore.\n")); d != "" {
		t.Errorf("as a table: -want +got:\n%s", d)
	}
}

func TestMerge(t *testing.T) {
	a, b := catalog.Metric{Name: "a", Type: "gauge", From: []string{"p"}}, catalog.Metric{Name: "b", Type: "gauge", From: []string{"p"}}
	ofQ := b
	ofQ.From = []string{"q"}
	ofQ.Labels = []string{"tier"}
	got, err := catalog.Merge([]catalog.Metric{b}, []catalog.Metric{a, ofQ}, []catalog.Metric{b})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0].Name != "a" || !slices.Equal(got[1].From, []string{"p", "q"}) || !slices.Equal(got[1].Labels, []string{"tier"}) {
		t.Errorf("%v", got)
	}
	ofQ.Help = "different"
	if _, err := catalog.Merge([]catalog.Metric{b}, []catalog.Metric{ofQ}); err == nil {
		t.Error("a metric with two helps is taken for one")
	}
	other := b
	other.Labels = []string{"kind"}
	if _, err := catalog.Merge([]catalog.Metric{other}, []catalog.Metric{{Name: "b", Type: "gauge", Labels: []string{"tier"}}}); err == nil {
		t.Error("a metric with other labels is taken for the same")
	}
}

func TestLint(t *testing.T) {
	known := map[string]string{"method": "what is served"}
	for _, tc := range []struct {
		name   string
		metric catalog.Metric
		want   string // in what is found; empty: nothing is
	}{
		{"sound", catalog.Metric{Name: "x_calls_total", Type: "counter", Labels: []string{"method"}, Help: "Calls."}, ""},
		{"no total", catalog.Metric{Name: "x_calls", Type: "counter", Help: "Calls."}, "_total"},
		{"no help", catalog.Metric{Name: "x_size_bytes", Type: "gauge"}, "help"},
		{"no base unit", catalog.Metric{Name: "x_time_milliseconds", Type: "histogram", Help: "Time."}, "base unit"},
		{"a label of any value", catalog.Metric{Name: "x_calls_total", Type: "counter", Labels: []string{"digest"}, Help: "Calls."}, "label digest"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := catalog.Lint([]catalog.Metric{tc.metric}, known)
			if err != nil {
				t.Fatal(err)
			}
			if found := strings.Join(got, "\n"); (tc.want == "") != (found == "") || !strings.Contains(found, tc.want) {
				t.Errorf("found %q, want what has %q", found, tc.want)
			}
		})
	}
}
