package operation_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/operation"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// withdrawals is a Withdrawer that remembers.
type withdrawals struct {
	mu    sync.Mutex
	names []string
	err   error
	held  chan struct{} // where not nil, Cancel waits for it
}

func (w *withdrawals) Cancel(_ context.Context, name string) error {
	w.mu.Lock()
	held := w.held
	w.names = append(w.names, name)
	err := w.err
	w.mu.Unlock()
	if held != nil {
		<-held
	}
	return err
}

func (w *withdrawals) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
}

// hold makes Cancel wait until the channel is closed.
func (w *withdrawals) hold() chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.held = make(chan struct{})
	return w.held
}

func (w *withdrawals) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	names := w.names
	w.names = nil
	return names
}

// start makes a registry that runs until the test ends.
func start(t *testing.T, o operation.RegistryOptions) (*operation.Registry, *withdrawals) {
	t.Helper()
	w := &withdrawals{}
	o.Jobs = w
	r, err := operation.NewRegistry(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return r, w
}

func name(action string) operation.Name {
	return operation.NewName(operation.Name{Action: digest.Of(digest.SHA256, []byte(action))})
}

func skipName(action string) operation.Name {
	n := name(action)
	n.SkipCacheLookup = true
	return n
}

func update(op *operation.Wait, attempt uint32, stage queuepb.Update_Stage, worker string) *queuepb.Update {
	u := &queuepb.Update{Operation: op.Job(), Attempt: attempt, Stage: stage, Worker: worker}
	if stage == queuepb.Update_COMPLETED {
		u.ExecuteResponse = []byte(worker)
	}
	return u
}

func stage(op *operation.Wait) operation.Stage {
	s, _ := op.Watch()
	return s.Stage
}

func TestRegistry_Join_merges(t *testing.T) {
	other := name("a")
	other.Instance = "other"
	for label, tc := range map[string]struct {
		first, second operation.Name
		merge         operation.Merge
		want          bool
	}{
		"equal":                         {name("a"), name("a"), operation.Mergeable, true},
		"another action":                {name("a"), name("b"), operation.Mergeable, false},
		"another instance":              {name("a"), other, operation.Mergeable, false},
		"do_not_cache":                  {name("a"), name("a"), operation.NotMergeable, false},
		"both skip":                     {skipName("a"), skipName("a"), operation.Mergeable, true},
		"a skipper joins no other":      {name("a"), skipName("a"), operation.Mergeable, false},
		"others may join one who skips": {skipName("a"), name("a"), operation.Mergeable, true},
	} {
		t.Run(label, func(t *testing.T) {
			r, _ := start(t, operation.RegistryOptions{})
			first, created := r.Join(tc.first, tc.merge)
			if !created {
				t.Fatal("the first is not new")
			}
			second, created := r.Join(tc.second, tc.merge)
			if merged := !created && first.Job() == second.Job(); merged != tc.want {
				t.Errorf("merged is %v, want %v", merged, tc.want)
			}
			if again, ok := r.Find(tc.second); !ok || again != second {
				t.Errorf("the second is found as %v, %v", again, ok)
			}
			if again, created := r.Join(tc.first, tc.merge); created || again != first {
				t.Error("the first name made a second operation")
			}
		})
	}
}

func TestRegistry_finished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := start(t, operation.RegistryOptions{KeepFinished: time.Minute})
		n, merged := name("a"), name("a")
		op, _ := r.Join(n, operation.Mergeable)
		r.Published(op, nil)
		r.Update(update(op, 1, queuepb.Update_EXECUTING, "w"))
		if q, x := r.Counts(); q != 0 || x != 1 {
			t.Errorf("Counts are %d queued, %d executing", q, x)
		}
		time.Sleep(time.Second)
		r.Update(update(op, 1, queuepb.Update_COMPLETED, "w"))
		r.Leave(op)
		if q, x := r.Counts(); q != 0 || x != 0 {
			t.Errorf("Counts are %d queued, %d executing", q, x)
		}
		time.Sleep(time.Millisecond)
		late := name("a")
		time.Sleep(59 * time.Second)
		for label, n := range map[string]operation.Name{"its name": n, "a name that was merged": merged} {
			if got, ok := r.Find(n); !ok || got.Job() != op.Job() {
				t.Errorf("%s finds %v, %v", label, got, ok)
			}
		}
		if got, ok := r.Find(late); ok {
			t.Errorf("a name from after the end finds %v", got.Job())
		}
		if got, created := r.Join(late, operation.Mergeable); !created {
			t.Errorf("a new client is merged with %v, which has ended", got.Job())
		}
		time.Sleep(time.Second)
		synctest.Wait()
		// By name, the first is gone; by its action, the newer one is in flight.
		if got, ok := r.Find(n); ok && got.Job() == op.Job() {
			t.Error("the operation is there after KeepFinished")
		}
	})
}

func TestRegistry_finished_isBounded(t *testing.T) {
	for label, o := range map[string]operation.RegistryOptions{
		"by number": {MaxFinished: 2},
		"by bytes":  {MaxFinishedBytes: 10},
	} {
		t.Run(label, func(t *testing.T) {
			r, _ := start(t, o)
			names := []operation.Name{name("a"), name("b"), name("c")}
			for _, n := range names {
				op, _ := r.Join(n, operation.Mergeable)
				r.Update(update(op, 1, queuepb.Update_COMPLETED, "12345"))
			}
			for i, want := range []bool{false, true, true} {
				if _, ok := r.Find(names[i]); ok != want {
					t.Errorf("operation %d is found: %v, want %v", i, ok, want)
				}
			}
		})
	}
}

func TestRegistry_abandons(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := start(t, operation.RegistryOptions{AbandonAfter: time.Minute})
		w.err = errors.New("the broker is away") // is logged, and harms nothing
		n := name("a")
		op, _ := r.Join(n, operation.Mergeable)
		r.Join(n, operation.Mergeable)
		kept, _ := r.Join(name("b"), operation.Mergeable)
		r.Published(op, nil)
		r.Leave(op)
		r.Leave(kept)
		time.Sleep(30 * time.Second)
		r.Leave(op)
		if _, ok := r.Find(name("b")); !ok {
			t.Error("b is gone")
		}
		time.Sleep(59 * time.Second)
		synctest.Wait()
		if got := w.take(); got != nil {
			t.Errorf("%v were withdrawn too early", got)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := w.take(); !slices.Equal(got, []string{op.Job()}) {
			t.Errorf("%v were withdrawn, want %v", got, op.Job())
		}
		if stage(op) != operation.Failed || stage(kept) != operation.Queued {
			t.Errorf("stages are %v and %v", stage(op), stage(kept))
		}
		if _, ok := r.Find(n); ok {
			t.Error("the abandoned operation is there")
		}
	})
}

// What the broker can't withdraw now is withdrawn later, unless somebody waits
// for it again.
func TestRegistry_withdrawsLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := start(t, operation.RegistryOptions{})
		down := errors.New("the broker is away")
		w.fail(down)
		gone, back := name("a"), name("b")
		for _, n := range []operation.Name{gone, back} {
			op, _ := r.Join(n, operation.Mergeable)
			r.Published(op, nil)
			r.Leave(op)
		}
		time.Sleep(5 * time.Minute) // they are abandoned
		synctest.Wait()
		if got := w.take(); len(got) == 0 {
			t.Fatal("nothing was withdrawn")
		}
		again, created := r.Join(back, operation.Mergeable)
		if !created {
			t.Fatal("the abandoned operation is there")
		}
		r.Published(again, nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		w.take()
		w.fail(nil)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := w.take(); !slices.Equal(got, []string{gone.String()}) {
			t.Errorf("%v were withdrawn, want %v", got, gone)
		}
		time.Sleep(time.Hour)
		if got := w.take(); got != nil {
			t.Errorf("%v were withdrawn twice", got)
		}
	})
}

// An operation that is taken up under its name while the job of the one before is
// withdrawn may lose its own: its clients begin anew.
func TestRegistry_withdrawsTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := start(t, operation.RegistryOptions{})
		n := name("a")
		op, _ := r.Join(n, operation.Mergeable)
		r.Published(op, nil)
		release := w.hold()
		r.Leave(op)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		next, created := r.Join(n, operation.Mergeable)
		if !created {
			t.Fatal("the abandoned operation is there")
		}
		r.Published(next, nil)
		close(release)
		synctest.Wait()
		if s, _ := next.Watch(); !errors.Is(s.Err, operation.ErrWithdrawn) {
			t.Errorf("the next operation is in %v, want it to begin anew", s.Stage)
		}
	})
}

func TestRegistry_Published_error(t *testing.T) {
	r, _ := start(t, operation.RegistryOptions{})
	n := name("a")
	op, _ := r.Join(n, operation.Mergeable)
	_, changed := op.Watch()
	down := errors.New("down")
	r.Published(op, down)
	<-changed
	if s, _ := op.Watch(); s.Stage != operation.Failed || !errors.Is(s.Err, down) {
		t.Errorf("snapshot is %+v", s)
	}
	again, created := r.Join(n, operation.Mergeable)
	if !created {
		t.Error("a retry joins the operation whose publishing failed")
	}
	r.Leave(op)
	if stage(again) != operation.Queued {
		t.Errorf("the retry is %v", stage(again))
	}
	if q, _ := r.Counts(); q != 1 {
		t.Errorf("%d are queued, want 1", q)
	}
}

// A waiter that does not read misses what is between, and sees the newest state;
// nobody waits for it.
func TestOperation_Watch_newest(t *testing.T) {
	r, _ := start(t, operation.RegistryOptions{})
	op, _ := r.Join(name("a"), operation.Mergeable)
	_, changed := op.Watch()
	for i := range 1000 {
		u := update(op, 1, queuepb.Update_EXECUTING, "w")
		u.PartialMetadata = fmt.Append(nil, i)
		r.Update(u)
	}
	<-changed
	s, changed := op.Watch()
	if string(s.Metadata) != "999" {
		t.Errorf("newest metadata is %s", s.Metadata)
	}
	select {
	case <-changed:
		t.Error("the newest state has changed already")
	default:
	}
	r.Update(update(op, 1, queuepb.Update_COMPLETED, "w"))
	<-changed
	if stage(op) != operation.Completed {
		t.Errorf("stage is %v", stage(op))
	}
}

func TestRegistry_Update_unknown(t *testing.T) {
	r, w := start(t, operation.RegistryOptions{})
	r.Update(&queuepb.Update{Operation: "operations/foreign", Attempt: 1, Stage: queuepb.Update_COMPLETED})
	if q, x := r.Counts(); q != 0 || x != 0 || w.take() != nil {
		t.Error("an update about an unknown operation did something")
	}
}

func TestNewRegistry_refuses(t *testing.T) {
	w := &withdrawals{}
	for label, o := range map[string]operation.RegistryOptions{
		"no jobs":        {},
		"abandon":        {Jobs: w, AbandonAfter: -1},
		"keep":           {Jobs: w, KeepFinished: -1},
		"finished":       {Jobs: w, MaxFinished: -1},
		"finished bytes": {Jobs: w, MaxFinishedBytes: -1},
	} {
		if _, err := operation.NewRegistry(o); err == nil {
			t.Errorf("%s: no error", label)
		}
	}
}

func BenchmarkRegistry(b *testing.B) {
	r, err := operation.NewRegistry(operation.RegistryOptions{Jobs: &withdrawals{}})
	if err != nil {
		b.Fatal(err)
	}
	n := name("a")
	b.ReportAllocs()
	for b.Loop() {
		op, _ := r.Join(operation.NewName(n), operation.Mergeable)
		r.Published(op, nil)
		r.Update(update(op, 1, queuepb.Update_EXECUTING, "w"))
		r.Update(update(op, 1, queuepb.Update_COMPLETED, "w"))
		r.Leave(op)
	}
}
