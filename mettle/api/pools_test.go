package api_test

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

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
	n := &queuepb.WorkerState{Worker: worker, Pool: pool, State: state, Slots: 4, Lifetime: durationpb.New(10 * time.Minute)}
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

// What no worker could have is refused at once.
func TestExecute_impossiblePlatform(t *testing.T) {
	inFleet(t, platform.Options{}, func(_ *testing.T, b *bench) {
		s := b.executeAction(b.store.action("a", platformOf("OSFamily=linux", "OSFamily=windows"))).err(codes.FailedPrecondition)
		if !strings.Contains(s.Message(), "takes one") {
			t.Errorf("message %q", s.Message())
		}
	})
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

// What waits for a pool that has gone for good is refused, or goes to another one
// that has come in the meantime.
func TestExecute_poolGoesWhileQueued(t *testing.T) {
	for name, tc := range map[string]struct {
		pool  string // which another worker is in
		other string // what it offers
		code  codes.Code
	}{
		"nobody else":   {"default", "gpu=no", codes.FailedPrecondition},
		"another pool":  {"more", "gpu=yes", codes.OK},
		"it comes back": {"gpu", "gpu=yes", codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			inFleet(t, platform.Options{Linger: time.Minute}, func(t *testing.T, b *bench) {
				b.announce("w", "gpu", queuepb.WorkerState_TAKING, "gpu=yes")
				w := b.executeAction(b.store.action("a", platformOf("gpu=yes")))
				merged := b.executeAction(b.store.action("a", platformOf("gpu=yes")))
				w.want(repb.ExecutionStage_QUEUED)
				merged.want(repb.ExecutionStage_QUEUED)
				time.Sleep(30 * time.Second)
				b.announce("w", "gpu", queuepb.WorkerState_GONE)
				time.Sleep(50 * time.Second)
				b.announce("o", tc.pool, queuepb.WorkerState_TAKING, tc.other)
				time.Sleep(30 * time.Second)
				if tc.code == codes.OK {
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					defer cancel()
					l, err := b.jobs.Lease(ctx, []string{tc.pool})
					if err != nil {
						t.Fatal(err)
					}
					b.complete(l, exit(0))
				}
				for _, c := range []*waiting{w, merged} {
					if got := c.response().GetStatus(); codes.Code(got.GetCode()) != tc.code {
						t.Errorf("status %v, want %v", got, tc.code)
					}
				}
				b.noLease()
			})
		})
	}
}

// The files in deploy/autoscaling name metrics that there are, with labels that
// they have.
func TestDeploy_metricsExist(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	newBench(t, func(o *api.Options) { o.Registerer = registry })
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{"mettle_workers_wanted": true} // which hpa.yaml itself makes
	for _, f := range families {
		known[f.GetName()] = true
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				known[l.GetName()] = true
				known[l.GetName()+`="`+l.GetValue()+`"`] = true
			}
		}
	}
	files, err := filepath.Glob("../../deploy/autoscaling/*")
	if err != nil || len(files) != 3 {
		t.Fatalf("files %q, %v", files, err)
	}
	names := regexp.MustCompile(`mettle_[a-z_]+`)
	selectors := regexp.MustCompile(`([a-z]+)="([a-z]+)"`)
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		found := names.FindAllString(string(data), -1)
		if len(found) == 0 {
			t.Errorf("%s names no metric", file)
		}
		for _, name := range append(found, selectors.FindAllString(string(data), -1)...) {
			if !known[name] {
				t.Errorf("%s names %s, which there is not", file, name)
			}
		}
	}
}

// What API servers want together is what it takes for all their operations.
func TestPools_desiredWorkers(t *testing.T) {
	inFleet(t, platform.Options{}, func(t *testing.T, b *bench) {
		b.announce("w1", "default", queuepb.WorkerState_TAKING, "OSFamily=linux")
		b.announce("w2", "default", queuepb.WorkerState_TAKING, "OSFamily=linux")
		for i := range 10 {
			b.executeAction(b.store.action(strings.Repeat("a", i+1))).want(repb.ExecutionStage_QUEUED)
		}
		l := b.lease()
		b.executing(l, "w1")
		synctest.Wait()
		pools := b.server.Pools()
		if len(pools) != 1 || pools[0].Queued != 9 || pools[0].Executing != 1 || pools[0].Taking != 2 || pools[0].DesiredWorkers != 2.5 {
			t.Errorf("pools %+v, want 9 queued and 1 executing for workers of 4 slots", pools)
		}
	})
}
