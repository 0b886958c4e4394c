package operation_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mettle-build/mettle/mettle/operation"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestRegistry_Loads(t *testing.T) {
	r, _ := start(t, operation.RegistryOptions{})
	want := func(want map[string]operation.Load) {
		t.Helper()
		if d := cmp.Diff(want, r.Loads()); d != "" {
			t.Errorf("loads (-want +got):\n%s", d)
		}
	}
	join := func(action, pool string) *operation.Wait {
		w, created := r.Join(name(action), operation.Mergeable)
		if !created {
			t.Fatalf("%s is not new", action)
		}
		r.Assign(w, pool)
		return w
	}
	want(map[string]operation.Load{})
	a, b, c := join("a", "x"), join("b", "x"), join("c", "y")
	r.Published(a, nil)
	r.Published(b, nil)
	want(map[string]operation.Load{"x": {Queued: 2}, "y": {Queued: 1}})
	r.Update(update(a, 1, queuepb.Update_EXECUTING, "w"))
	want(map[string]operation.Load{"x": {Queued: 1, Executing: 1}, "y": {Queued: 1}})
	if got := r.QueuedFor("x"); !slices.Equal(got, []string{b.Job()}) {
		t.Errorf("queued for x are %q", got)
	}
	if got := r.QueuedFor("z"); got != nil {
		t.Errorf("queued for z are %q", got)
	}
	r.Update(update(a, 1, queuepb.Update_REQUEUED, "w"))
	want(map[string]operation.Load{"x": {Queued: 2}, "y": {Queued: 1}})
	r.Update(update(a, 2, queuepb.Update_COMPLETED, "w"))
	r.Published(c, errors.New("no room"))
	r.Assign(c, "y") // too late
	want(map[string]operation.Load{"x": {Queued: 1}})
	r.Update(update(b, 1, queuepb.Update_COMPLETED, "w"))
	want(map[string]operation.Load{})
}

// The one that has waited longest is found among many, of each pool, wherever it is.
func TestRegistry_OldestQueued(t *testing.T) {
	r, _ := start(t, operation.RegistryOptions{})
	join := func(action, pool string, created time.Time) *operation.Wait {
		n := name(action)
		n.Created = created
		w, _ := r.Join(n, operation.NotMergeable)
		r.Assign(w, pool)
		r.Published(w, nil)
		return w
	}
	if got := r.OldestQueued(); len(got) != 0 {
		t.Errorf("of nothing the oldest is %v", got)
	}
	t0 := time.UnixMicro(1e15)
	first := join("a", "x", t0)
	for i := range 2000 { // more than are looked at together
		join(fmt.Sprint("b", i), "x", t0.Add(time.Duration(i+1)*time.Second))
	}
	join("c", "y", t0.Add(time.Hour))
	want := map[string]time.Time{"x": t0, "y": t0.Add(time.Hour)}
	if d := cmp.Diff(want, r.OldestQueued()); d != "" {
		t.Errorf("oldest (-want +got):\n%s", d)
	}
	r.Update(update(first, 1, queuepb.Update_EXECUTING, "w"))
	want["x"] = t0.Add(time.Second)
	if d := cmp.Diff(want, r.OldestQueued()); d != "" {
		t.Errorf("oldest when the first runs (-want +got):\n%s", d)
	}
}
