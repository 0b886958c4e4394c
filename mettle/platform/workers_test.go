package platform_test

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/mettle/platform"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

const (
	taking   = queuepb.WorkerState_TAKING
	paused   = queuepb.WorkerState_PAUSED
	draining = queuepb.WorkerState_DRAINING
	gone     = queuepb.WorkerState_GONE
)

// fleet is a Set, and a bubble's time, in a test.
type fleet struct {
	*platform.Set
	t   *testing.T
	log *strings.Builder
}

// inFleet runs f with a Set that has heard for long enough to know all.
func inFleet(t *testing.T, o platform.Options, f func(f *fleet)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		log := &strings.Builder{}
		o.FromWorkers, o.Logger = true, slog.New(slog.NewTextHandler(log, nil))
		set, err := platform.New(o)
		if err != nil {
			t.Fatal(err)
		}
		fl := &fleet{Set: set, t: t, log: log}
		fl.listen(time.Minute)
		f(fl)
	})
}

// listen lets time pass in which notices come, of others.
func (f *fleet) listen(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(min(5*time.Second, time.Until(end))) {
		f.Heard()
	}
	f.Heard()
}

func (f *fleet) tell(name, pool string, state queuepb.WorkerState_State, props ...string) {
	w := &queuepb.WorkerState{Worker: name, Pool: pool, State: state, Slots: 4, Running: 1, Lifetime: durationpb.New(45 * time.Second)}
	for _, p := range props {
		key, value, _ := strings.Cut(p, "=")
		w.Properties = append(w.Properties, &queuepb.Property{Name: key, Value: value})
	}
	f.Observe(w)
}

// keep tells the same for a while, as a worker does.
func (f *fleet) keep(d time.Duration, name, pool string, state queuepb.WorkerState_State, props ...string) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		f.tell(name, pool, state, props...)
		f.listen(min(15*time.Second, time.Until(end)))
	}
}

// want checks where an action goes; to "" if it is refused.
func (f *fleet) want(pool string, props ...string) {
	f.t.Helper()
	got, err := f.Match(ask(props...))
	if got != pool || (pool == "") != errors.Is(err, platform.ErrUnsupported) {
		f.t.Errorf("Match(%v) = %q, %v, want %q", props, got, err, pool)
	}
}

func (f *fleet) wantNames(names ...string) {
	f.t.Helper()
	if got := f.Names(); !slices.Equal(got, names) {
		f.t.Errorf("pools %q, want %q", got, names)
	}
}

func TestSet_Observe_poolsComeAndGo(t *testing.T) {
	inFleet(t, platform.Options{Linger: 5 * time.Minute}, func(f *fleet) {
		f.want("")
		f.want("", "gpu=yes")
		f.tell("w1", "gpu", taking, "gpu=yes")
		f.want("gpu", "gpu=yes")
		f.want("gpu") // there is no other
		f.tell("w2", "default", taking, "OSFamily=linux")
		f.want("default")
		f.wantNames("default", "gpu")
		f.tell("w1", "gpu", gone)
		f.keep(5*time.Minute-time.Second, "w2", "default", taking, "OSFamily=linux")
		f.want("gpu", "gpu=yes") // as while it is restarted
		f.keep(2*time.Second, "w2", "default", taking, "OSFamily=linux")
		f.want("", "gpu=yes")
		f.wantNames("default")
		f.tell("w3", "gpu", taking, "gpu=yes")
		f.want("gpu", "gpu=yes")
	})
}

// A worker that says nothing more is gone after its lifetime.
func TestSet_Observe_lifetime(t *testing.T) {
	inFleet(t, platform.Options{Linger: time.Minute}, func(f *fleet) {
		f.tell("w", "gpu", taking, "gpu=yes")
		f.listen(44 * time.Second)
		if got := f.Figures()[0].Taking; got != 1 {
			t.Errorf("%d workers, want 1", got)
		}
		f.listen(2 * time.Second)
		if got := f.Figures()[0].Taking; got != 0 {
			t.Errorf("%d workers, want none", got)
		}
		f.want("gpu", "gpu=yes")
		f.listen(time.Minute)
		f.want("", "gpu=yes")
	})
}

func TestSet_Match_choosesTheLeastSurplus(t *testing.T) {
	inFleet(t, platform.Options{}, func(f *fleet) {
		f.tell("a", "big", taking, "OSFamily=linux", "mem=big")
		f.tell("b", "gpu", taking, "OSFamily=linux", "gpu=yes")
		f.tell("c", "both", taking, "OSFamily=linux", "gpu=yes", "mem=big")
		f.tell("d", "zebra", taking, "OSFamily=linux", "stripes=*")
		f.want("big") // no default pool: the first of the least
		f.want("big", "OSFamily=Linux")
		f.want("big", "mem=big")
		f.want("gpu", "gpu=yes")
		f.want("both", "gpu=yes", "mem=big")
		f.want("zebra", "stripes=7")
		f.tell("e", "default", taking, "OSFamily=linux", "rust=no")
		f.want("default", "OSFamily=linux") // as good as others
		f.want("big", "mem=big")
		f.tell("e", "default", taking, "OSFamily=linux", "rust=no", "more=yes")
		f.want("default")
		f.want("default", "container-image=none")
	})
}

func TestSet_Match_namesTheNearest(t *testing.T) {
	inFleet(t, platform.Options{}, func(f *fleet) {
		f.tell("a", "a", taking, "OSFamily=linux", "mem=big")
		f.tell("b", "b", taking, "OSFamily=linux", "gpu=yes", "cuda=12")
		for _, tc := range []struct{ asks, says []string }{
			{[]string{"gpu=yes", "cuda=13"}, []string{`property "cuda" of value "13"`, "accepted are 12", `nearest pool, "b", lacks cuda=13`}},
			{[]string{"gpu=yes", "cuda=12", "mem=big"}, []string{"none has all", `nearest pool, "b", lacks mem=big`}},
			{[]string{"tpu=yes"}, []string{`property "tpu"`, "no worker declares", "OSFamily, cuda, gpu, mem", `"a", lacks tpu=yes`}},
		} {
			_, err := f.Match(ask(tc.asks...))
			if err == nil {
				t.Errorf("%v is not refused", tc.asks)
				continue
			}
			for _, s := range tc.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%v: %q does not say %q", tc.asks, err, s)
				}
			}
		}
	})
}

// What not all workers of a pool have is not offered.
func TestSet_Observe_intersection(t *testing.T) {
	inFleet(t, platform.Options{}, func(f *fleet) {
		f.tell("old", "default", taking, "OSFamily=linux", "gcc=12")
		f.want("default", "gcc=12")
		f.tell("new", "default", taking, "OSFamily=linux", "gcc=12", "gcc=14")
		f.want("", "gcc=14")
		f.want("default", "gcc=12")
		for range 100 {
			f.tell("new", "default", taking, "OSFamily=linux", "gcc=12", "gcc=14")
			f.tell("new-2", "default", taking, "OSFamily=linux", "gcc=12", "gcc=14")
		}
		if got := strings.Count(f.log.String(), "differs"); got != 1 || !strings.Contains(f.log.String(), "gcc=14") || !strings.Contains(f.log.String(), "worker=new") {
			t.Errorf("the log is not of one line that names pool, worker and property:\n%s", f.log)
		}
		// One that drains takes no more actions.
		f.tell("old", "default", draining, "OSFamily=linux", "gcc=12")
		f.want("default", "gcc=14")
		f.tell("old", "default", draining, "OSFamily=linux", "gcc=12")
		f.tell("new", "default", gone)
		f.tell("new-2", "default", gone)
		f.want("default", "gcc=14")
		f.tell("old", "default", taking, "OSFamily=linux", "gcc=12")
		f.want("", "gcc=14")
	})
}

// Declared pools need no workers, and keep what is declared whatever workers say.
func TestSet_declaredPools(t *testing.T) {
	gpu, err := platform.ParsePool("gpu/8:gpu=yes,OSFamily=linux")
	if err != nil {
		t.Fatal(err)
	}
	inFleet(t, platform.Options{Pools: []platform.Pool{gpu}, Linger: time.Minute}, func(f *fleet) {
		f.want("gpu", "gpu=yes")
		f.tell("w", "gpu", taking, "OSFamily=linux", "cuda=12")
		f.want("gpu", "gpu=yes", "cuda=12")
		if !strings.Contains(f.log.String(), "lacks=gpu=yes") && !strings.Contains(f.log.String(), `lacks="gpu=yes"`) {
			t.Errorf("the log does not tell that the worker lacks what is declared:\n%s", f.log)
		}
		f.tell("w", "gpu", gone)
		f.listen(time.Hour)
		f.want("gpu", "gpu=yes", "cuda=12")
	})
}

// While it can't hear, and for a while after, a Set forgets nothing and says that
// it may not know all.
func TestSet_Unsettled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		set, err := platform.New(platform.Options{FromWorkers: true, Linger: time.Minute, Settle: 25 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		f := &fleet{Set: set, t: t}
		unsettled := func(want bool) <-chan struct{} {
			t.Helper()
			changed, left, got := set.Unsettled()
			if got != want || got && left <= 0 {
				t.Errorf("Unsettled is %v, for %v, want %v", got, left, want)
			}
			return changed
		}
		changed := unsettled(true)
		time.Sleep(time.Hour)
		unsettled(true)
		f.Heard()
		<-changed
		f.listen(24 * time.Second)
		unsettled(true)
		f.listen(2 * time.Second)
		unsettled(false)
		f.tell("w", "gpu", taking, "gpu=yes")
		time.Sleep(time.Hour) // without the broker
		unsettled(true)
		f.want("gpu", "gpu=yes")
		f.Heard()
		f.want("gpu", "gpu=yes") // time to tell of itself
		unsettled(true)
		f.listen(26 * time.Second)
		unsettled(false)
		f.want("", "gpu=yes")
	})
}

func TestSet_Observe_wakesThoseWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		set, err := platform.New(platform.Options{FromWorkers: true})
		if err != nil {
			t.Fatal(err)
		}
		f := &fleet{Set: set, t: t}
		f.Heard()
		changed, _, _ := set.Unsettled()
		f.tell("w", "gpu", taking, "gpu=yes")
		<-changed
		changed, _, _ = set.Unsettled()
		f.tell("w", "gpu", taking, "gpu=yes")
		select {
		case <-changed:
			t.Error("woken though nothing has changed")
		default:
		}
	})
}

// Whoever speaks nonsense is not heard, and can't fill the memory.
func TestSet_Observe_nonsense(t *testing.T) {
	inFleet(t, platform.Options{}, func(f *fleet) {
		long := strings.Repeat("x", 2000)
		many := make([]string, 200)
		for i := range many {
			many[i] = fmt.Sprint("p=", i)
		}
		f.tell("", "p", taking)
		f.tell("w", "", taking)
		f.tell(long, "p", taking)
		f.tell("w", long, taking)
		f.tell("w", "\xff", taking)
		f.tell("w", "p", taking, "a="+long)
		f.tell("w", "p", taking, long+"=a")
		f.tell("w", "p", taking, "=a")
		f.tell("w", "p", taking, "a=\xff")
		f.tell("w", "p", taking, many...)
		f.tell("w", "p", queuepb.WorkerState_STATE_UNSPECIFIED)
		f.Observe(nil)
		f.wantNames()
		if got := strings.Count(f.log.String(), "ignored_so_far"); got != 4 { // 1, 2, 4, 8
			t.Errorf("told %d times:\n%s", got, f.log)
		}
		for i := range 1000 {
			f.tell(fmt.Sprint("w", i), fmt.Sprint("pool-", i), taking, fmt.Sprint("a=", i))
		}
		for i := range 1000 {
			f.tell(fmt.Sprint("w", i), "pool-1", taking, fmt.Sprint("a=", i))
		}
		if n := len(f.Names()); n != 256 {
			t.Errorf("%d pools", n)
		}
		f.Observe(&queuepb.WorkerState{Worker: "big", Pool: "pool-1", State: taking, Slots: 1 << 30, Running: -5, Lifetime: durationpb.New(1e6 * time.Hour)})
		if got := f.Figures()[1]; got.Slots > 1<<20 || got.Running < 0 {
			t.Errorf("figures %+v", got)
		}
		f.listen(11 * time.Minute)
		f.listen(5 * time.Minute)
		f.wantNames()
	})
}

func TestSet_Figures(t *testing.T) {
	inFleet(t, platform.Options{Pools: []platform.Pool{{Name: "gpu", Slots: 8}}}, func(f *fleet) {
		f.tell("a", "default", taking, "x=y")
		f.tell("b", "default", taking, "x=y")
		f.tell("c", "default", paused, "x=y")
		f.tell("d", "default", draining, "x=y")
		want := []platform.Figures{
			{Name: "default", Properties: props(t, "x=y"), Taking: 2, Paused: 1, Draining: 1, Slots: 16, Running: 4, Idle: 6, SlotsPerWorker: 4},
			{Name: "gpu", Declared: true, SlotsPerWorker: 8},
		}
		if d := cmp.Diff(want, f.Figures()); d != "" {
			t.Errorf("figures (-want +got):\n%s", d)
		}
		for _, w := range []string{"a", "b", "c", "d"} {
			f.tell(w, "default", gone)
		}
		if got := f.Figures()[0]; got.Slots != 0 || got.SlotsPerWorker != 4 {
			t.Errorf("figures %+v, want the slots of the last workers", got)
		}
	})
}

// A dual's own worker tells of itself too, and is shown; its pool is there before.
func TestSet_Observe_withoutFromWorkers(t *testing.T) {
	set, err := platform.New(platform.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f := &fleet{Set: set, t: t}
	f.tell("w", "default", taking, "gpu=yes")
	f.tell("w", "other", taking, "gpu=yes")
	f.wantNames("default")
	if got := f.Figures()[0]; got.Slots != 4 {
		t.Errorf("figures %+v", got)
	}
	if _, _, unsettled := set.Unsettled(); unsettled {
		t.Error("it waits for workers that it would not serve")
	}
}

// Whatever comes, the pools stay few and their figures possible.
func FuzzSet_Observe(f *testing.F) {
	for _, w := range []*queuepb.WorkerState{
		{},
		{Worker: "w", Pool: "p", State: taking, Slots: 4, Running: 1, Properties: []*queuepb.Property{{Name: "a", Value: "b"}}},
		{Worker: "w", Pool: "p", State: gone, Slots: -4, Lifetime: &durationpb.Duration{Seconds: -1, Nanos: 1 << 30}},
	} {
		data, err := proto.Marshal(w)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, data)
	}
	f.Fuzz(func(t *testing.T, one, two []byte) {
		set, err := platform.New(platform.Options{FromWorkers: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, data := range [][]byte{one, two, one} {
			w := &queuepb.WorkerState{}
			if proto.Unmarshal(data, w) != nil {
				return
			}
			set.Observe(w)
			for _, p := range set.Figures() {
				if p.Slots < 0 || p.Running < 0 || p.Idle < 0 || p.Idle > p.Slots || p.SlotsPerWorker <= 0 || p.Name == "" || p.Taking+p.Paused+p.Draining > 2 {
					t.Errorf("figures %+v", p)
				}
			}
			if len(set.Names()) > 2 {
				t.Errorf("pools %q", set.Names())
			}
		}
	})
}

// One of 20,000 workers says that it is there.
func BenchmarkSet_Observe(b *testing.B) {
	set, err := platform.New(platform.Options{FromWorkers: true})
	if err != nil {
		b.Fatal(err)
	}
	states := make([]*queuepb.WorkerState, 20_000)
	for i := range states {
		states[i] = &queuepb.WorkerState{
			Worker: fmt.Sprint("worker-", i), Pool: fmt.Sprint("pool-", i%4), State: taking, Slots: 8, Running: int32(i % 8),
			Properties: []*queuepb.Property{{Name: "OSFamily", Value: "linux"}, {Name: "ISA", Value: "x86-64"}, {Name: "Arch", Value: "amd64"}},
		}
		set.Observe(states[i])
	}
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		set.Observe(states[i%len(states)])
		i++
	}
}
