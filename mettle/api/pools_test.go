package api_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/platform"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// fleet makes the pools those that workers tell of.
func fleet(t *testing.T, b *bench, o platform.Options) func(*api.Options) {
	t.Helper()
	o.FromWorkers = true
	set, err := platform.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return func(a *api.Options) { a.Platforms, a.Notices = set, b.jobs }
}

// inFleet runs f in a synctest bubble with a bench whose pools come from workers.
func inFleet(t *testing.T, o platform.Options, f func(t *testing.T, b *bench)) {
	t.Helper()
	inBubble(t, func(t *testing.T, b *bench) {
		b.stop()
		b.start(fleet(t, b, o))
		f(t, b)
	})
}

// announce says that a worker is in some state.
func (b *bench) announce(worker, pool string, state queuepb.WorkerState_State, props ...string) {
	b.t.Helper()
	synctest.Wait() // until it listens
	n := &queuepb.WorkerState{Worker: worker, Pool: pool, State: state, Slots: 4}
	for _, s := range props {
		name, value, _ := strings.Cut(s, "=")
		n.Properties = append(n.Properties, &queuepb.Property{Name: name, Value: value})
	}
	if err := b.jobs.Notify(b.t.Context(), &queuepb.Notice{About: &queuepb.Notice_Worker{Worker: n}}); err != nil {
		b.t.Fatal(err)
	}
	synctest.Wait()
}

func platformOf(props ...string) func(*repb.Action, *repb.Command) {
	return func(a *repb.Action, _ *repb.Command) {
		a.Platform = &repb.Platform{}
		for _, s := range props {
			name, value, _ := strings.Cut(s, "=")
			a.Platform.Properties = append(a.Platform.Properties, &repb.Platform_Property{Name: name, Value: value})
		}
	}
}

// A server that has just started does not refuse what it has not heard of yet.
func TestExecute_waitsUntilWorkersAreKnown(t *testing.T) {
	inFleet(t, platform.Options{}, func(t *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a", platformOf("gpu=yes")))
		w.want(repb.ExecutionStage_CACHE_CHECK)
		time.Sleep(10 * time.Second)
		b.announce("w", "gpu", queuepb.WorkerState_TAKING, "gpu=yes")
		w.want(repb.ExecutionStage_QUEUED)
	})
}

func TestExecute_refusesOnceWorkersAreKnown(t *testing.T) {
	inFleet(t, platform.Options{}, func(t *testing.T, b *bench) {
		b.announce("w", "default", queuepb.WorkerState_TAKING, "OSFamily=linux")
		start := time.Now()
		w := b.executeAction(b.store.action("a", platformOf("gpu=yes")))
		res := w.response()
		if c := codes.Code(res.GetStatus().GetCode()); c != codes.FailedPrecondition || !strings.Contains(res.GetStatus().GetMessage(), "gpu") {
			t.Errorf("status %v, want it refused", res.GetStatus())
		}
		if waited := time.Since(start); waited < 20*time.Second || waited > 40*time.Second {
			t.Errorf("refused after %v", waited)
		}
		// From now on at once, and accepted again when a pool appears.
		start = time.Now()
		again := b.store.action("b", platformOf("gpu=yes"))
		b.executeAction(again).err(codes.FailedPrecondition)
		if waited := time.Since(start); waited > time.Second {
			t.Errorf("refused after %v, want at once", waited)
		}
		b.announce("g", "gpu", queuepb.WorkerState_TAKING, "gpu=yes")
		b.executeAction(again).want(repb.ExecutionStage_QUEUED)
	})
}

func TestExecute_waitingForWorkersEndsWithTheServer(t *testing.T) {
	inFleet(t, platform.Options{}, func(_ *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a", platformOf("gpu=yes")))
		w.want(repb.ExecutionStage_CACHE_CHECK)
		b.server.Shutdown()
		w.err(codes.Unavailable)
	})
}

func TestExecute_waitingForWorkersEndsWithTheClient(t *testing.T) {
	inFleet(t, platform.Options{}, func(_ *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a", platformOf("gpu=yes")))
		w.want(repb.ExecutionStage_CACHE_CHECK)
		w.leave()
		w.err(codes.Canceled)
	})
}

// Pools that the operator declares have no need of workers.
func TestExecute_declaredPool(t *testing.T) {
	gpu, err := platform.ParsePool("gpu/8:gpu=yes")
	if err != nil {
		t.Fatal(err)
	}
	inFleet(t, platform.Options{Pools: []platform.Pool{gpu}}, func(_ *testing.T, b *bench) {
		b.executeAction(b.store.action("a", platformOf("gpu=yes"))).want(repb.ExecutionStage_QUEUED)
	})
}
