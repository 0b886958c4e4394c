package history_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/mettle-build/mettle/mettle/history"
)

func newHistory(tb testing.TB, o history.Options) *history.History {
	tb.Helper()
	h, err := history.New(o)
	if err != nil {
		tb.Fatal(err)
	}
	return h
}

func action(target, output string) history.Action {
	return history.Action{Target: target, Mnemonic: "CppCompile", Program: "/usr/bin/gcc", Output: output}
}

func TestHistory_Expected(t *testing.T) {
	h := newHistory(t, history.Options{})
	first, second := h.Key(action("//a", "a.o")), h.Key(action("//a", "b.o"))
	if d, ok := h.Expected(first); ok {
		t.Errorf("%v is expected of what nobody has seen", d)
	}
	h.Observe(first, 10*time.Second)
	for what, k := range map[string]history.Key{"the same": first, "one that is alike": second} {
		if d, ok := h.Expected(k); !ok || d != 10*time.Second {
			t.Errorf("%v, %v is expected of %s, want 10s", d, ok, what)
		}
	}
	other := action("//a", "a.o")
	other.Mnemonic = "GoLink"
	if d, ok := h.Expected(h.Key(other)); ok {
		t.Errorf("%v is expected of an action that is not alike", d)
	}
	instance := action("//a", "a.o")
	instance.Instance = "other"
	if d, ok := h.Expected(h.Key(instance)); ok {
		t.Errorf("%v is expected in another instance", d)
	}
	h.Observe(first, 0)
	h.Observe(first, -time.Second)
	if d, _ := h.Expected(first); d != 10*time.Second {
		t.Errorf("%v is expected after times that tell nothing, want 10s", d)
	}
}

// What has become twice as slow is known to be so within a few builds, and one
// that is slow by chance does not count for much among those that are alike.
func TestHistory_Observe_learns(t *testing.T) {
	h := newHistory(t, history.Options{})
	k := h.Key(action("//a", "a.o"))
	h.Observe(k, time.Second)
	for range 10 {
		h.Observe(k, 2*time.Second)
	}
	if d, _ := h.Expected(k); d < 1900*time.Millisecond || d > 2*time.Second {
		t.Errorf("after ten times of 2s, %v is expected", d)
	}
	for i := range 1000 {
		h.Observe(h.Key(action("//b", fmt.Sprint(i))), time.Second)
	}
	h.Observe(h.Key(action("//b", "slow")), 10*time.Second)
	if d, _ := h.Expected(h.Key(action("//c", "new"))); d > 1300*time.Millisecond {
		t.Errorf("%v is expected of a new one, want about 1s", d)
	}
}

func TestHistory_isBounded(t *testing.T) {
	registry := prometheus.NewRegistry()
	h := newHistory(t, history.Options{MaxKeys: 1000, Registerer: registry})
	used := h.Key(action("//used", "a.o"))
	h.Observe(used, time.Minute)
	for i := range 10_000 {
		h.Observe(h.Key(action("//a", fmt.Sprint(i))), time.Second)
		if i%100 == 0 {
			if d, ok := h.Expected(used); !ok || d != time.Minute {
				t.Fatalf("after %d others, %v, %v is expected of what is in use, want 1m", i, d, ok)
			}
		}
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "mettle_history_keys" {
			if n := f.GetMetric()[0].GetGauge().GetValue(); n > 1000 || n < 500 {
				t.Errorf("%v keys, want at most 1000, and not much fewer", n)
			}
		}
	}
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v %v", problems, err)
	}
}

func TestNew_refusesNegative(t *testing.T) {
	if _, err := history.New(history.Options{MaxKeys: -1}); err == nil {
		t.Error("New succeeded")
	}
}

func BenchmarkHistory(b *testing.B) {
	h := newHistory(b, history.Options{})
	actions := make([]history.Action, 50_000)
	for i := range actions {
		actions[i] = action("//some/package:target", fmt.Sprintf("bazel-out/k8-fastbuild/bin/some/package/%d.o", i))
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		k := h.Key(actions[i%len(actions)])
		h.Expected(k)
		h.Observe(k, time.Second)
	}
}
