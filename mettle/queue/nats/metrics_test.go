package nats_test

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/nats"
)

func TestMetrics(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	reg := prometheus.NewPedanticRegistry()
	// One that fails leaves nothing behind.
	o := nats.Options{Servers: []string{"nats://127.0.0.1:1"}, Timeout: 200 * time.Millisecond, Registerer: reg}
	for range 2 {
		if _, err := nats.New(t.Context(), o); !errors.Is(err, queue.ErrUnavailable) {
			t.Fatalf("New without a broker: %v", err)
		}
	}
	q := newQueue(t, b, func(o *nats.Options) { o.Registerer, o.MaxAttempts = reg, 2 })
	mustPublish(t, q, "a", "a")
	for attempt := uint32(1); attempt <= 2; attempt++ {
		if err := mustLease(t, q, "a", attempt).Reject(t.Context(), "no disk"); err != nil {
			t.Fatal(err)
		}
	}
	mustPublish(t, q, "b")
	lost := mustLease(t, q, "b", 1)
	if err := mustLease(t, q, "b", 2).Ack(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := lost.Extend(t.Context()); !errors.Is(err, queue.ErrLeaseLost) {
		t.Fatalf("extend: %v", err)
	}
	if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			got[name] = m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	want := map[string]float64{
		"mettle_nats_leases_total": 4, "mettle_nats_redelivered_total": 2, "mettle_nats_leases_lost_total": 1,
		"mettle_nats_leases_lapsed_total": 1, "mettle_nats_attempts_used_up_total": 1, "mettle_nats_surplus_total": 0,
		"mettle_nats_reconnects_total": 0, "mettle_nats_call_seconds publish_job": 3,
		"mettle_nats_call_failures_total publish_job duplicate": 1,
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			delete(got, name)
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("metrics (-want +got):\n%s", d)
	}
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := testutil.GatherAndCount(reg); n != 0 || err != nil {
		t.Errorf("%d metrics are left after Close, %v", n, err)
	}
}
