package api_test

import (
	"testing"
	"testing/synctest"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/queue"
)

// seen are the values of a family by its last label, without those that are 0: of
// histograms, how often something was observed.
func seen(t *testing.T, r prometheus.Gatherer, name string) map[string]float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			label := ""
			for _, l := range m.GetLabel() {
				label = l.GetValue()
			}
			if v := m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount()); v != 0 {
				got[label] += v
			}
		}
	}
	return got
}

// What becomes of an action at the door is counted, and why it was refused.
func TestMetrics_door(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, func(o *api.Options) { o.Registerer = registry })
		cached := b.store.action("cached")
		b.store.cache(cached, exit(0).GetResult())
		b.executeAction(cached).response()
		first := b.executeAction(b.store.action("queued"))
		first.want(repb.ExecutionStage_QUEUED)
		second := b.executeAction(b.store.action("queued"))
		second.want(repb.ExecutionStage_QUEUED)
		b.execute(&repb.ExecuteRequest{}).err(codes.InvalidArgument)
		b.executeAction(digest.Of(digest.SHA256, []byte("nowhere")).Proto()).err(codes.FailedPrecondition)
		b.executeAction(b.store.action("elsewhere", func(a *repb.Action, _ *repb.Command) {
			a.Platform = &repb.Platform{Properties: []*repb.Platform_Property{{Name: "OSFamily", Value: "windows"}}}
		})).err(codes.FailedPrecondition)

		time.Sleep(90 * time.Second)
		for name, want := range map[string]map[string]float64{
			"mettle_execute_accept_seconds":     {"cached": 1, "queued": 1, "merged": 1, "refused": 2},
			"mettle_executes_refused_total":     {"invalid": 1, "missing_blobs": 1, "no_worker": 1},
			"mettle_publish_seconds":            {"": 1},
			"mettle_pool_oldest_queued_seconds": {"default": 90},
		} {
			got := seen(t, registry, name)
			if oldest, ok := got["default"]; ok && name == "mettle_pool_oldest_queued_seconds" {
				got["default"] = float64(int(oldest)) // the clients' first calls took no time, but for rounding
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("%s (-want +got):\n%s", name, d)
			}
		}
		b.complete(b.lease(), exit(0))
		first.response()
		second.response()
		if got := seen(t, registry, "mettle_pool_oldest_queued_seconds"); len(got) != 0 {
			t.Errorf("somebody waits when nobody does: %v", got)
		}
	})
}

// What the broker does not take is refused for that.
func TestMetrics_queueFull(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, func(o *api.Options) { o.Registerer = registry })
		b.jobs.fail(queue.ErrFull)
		b.executeAction(b.store.action("a")).err(codes.ResourceExhausted)
		if d := cmp.Diff(map[string]float64{"queue_full": 1}, seen(t, registry, "mettle_executes_refused_total")); d != "" {
			t.Errorf("refused (-want +got):\n%s", d)
		}
	})
}
