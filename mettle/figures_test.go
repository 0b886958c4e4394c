package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/metrics"
)

// The index page has rows for what has happened, and tables only of what the process
// does.
func TestActionTables(t *testing.T) {
	r := prometheus.NewPedanticRegistry()
	ended := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mettle_worker_actions_total", Help: "x"}, []string{"outcome"})
	stages := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "mettle_worker_stage_duration_seconds", Help: "x"}, []string{"stage"})
	waited := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "mettle_worker_lease_wait_seconds", Help: "x"})
	r.MustRegister(ended, stages, waited)
	ended.WithLabelValues("success").Add(3)
	ended.WithLabelValues("disk_quota").Inc()
	ended.WithLabelValues("timeout")
	stages.WithLabelValues("input_fetch").Observe(0.001)
	stages.WithLabelValues("input_fetch").Observe(0.002)
	stages.WithLabelValues("execution").Observe(61.234567)
	got, err := actionTables(r)
	if err != nil {
		t.Fatal(err)
	}
	want := []metrics.Table{{Title: "Jobs on this worker", Rows: []metrics.Row{
		{Name: "Ended", Value: "disk quota 1, success 3", Note: "by outcome"},
		{Name: "execution", Value: "1m1.23s on average, of 1", Note: "of a job's time here"},
		{Name: "input fetch", Value: "1.5ms on average, of 2", Note: "of a job's time here"},
	}}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if got, err := actionTables(prometheus.NewRegistry()); err != nil || len(got) != 0 {
		t.Errorf("of nothing: %v %v", got, err)
	}
}
