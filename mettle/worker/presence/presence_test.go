package presence_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/worker/presence"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// notices writes down what is told.
type notices struct {
	mu    sync.Mutex
	err   error
	calls int
	told  []*queuepb.WorkerState
}

func (n *notices) Notify(_ context.Context, msg *queuepb.Notice) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calls++
	if n.err != nil {
		return n.err
	}
	n.told = append(n.told, msg.GetWorker())
	return nil
}

func (n *notices) fail(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.err = err
}

// take returns what was told since the last time.
func (n *notices) take() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := make([]string, len(n.told))
	for i, s := range n.told {
		out[i] = fmt.Sprintf("%s %d", s.GetState(), s.GetRunning())
		if s.GetReason() != "" {
			out[i] += " " + s.GetReason()
		}
	}
	n.told = nil
	return strings.Join(out, ", ")
}

// inBubble runs f with a Presence that runs, in a bubble, until stop is called.
func inBubble(t *testing.T, o presence.Options, f func(p *presence.Presence, n *notices, stop func())) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := &notices{}
		o.Notices, o.Worker, o.Slots = n, "w", 4
		if o.Pools == nil {
			o.Pools = []string{"default"}
		}
		p, err := presence.New(o)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			p.Run(ctx)
		}()
		stop := sync.OnceFunc(func() {
			cancel()
			<-ended
		})
		defer stop()
		synctest.Wait()
		f(p, n, stop)
	})
}

func want(t *testing.T, n *notices, what string) {
	t.Helper()
	synctest.Wait()
	if got := n.take(); got != what {
		t.Errorf("told %q, want %q", got, what)
	}
}

func TestPresence_tellsWhatChanges(t *testing.T) {
	inBubble(t, presence.Options{}, func(p *presence.Presence, n *notices, stop func()) {
		want(t, n, "TAKING 0")
		p.Set(queuepb.WorkerState_PAUSED, "the disk is full")
		want(t, n, "PAUSED 0 the disk is full")
		p.Set(queuepb.WorkerState_PAUSED, "the disk is full")
		want(t, n, "")
		p.Set(queuepb.WorkerState_TAKING, "")
		want(t, n, "TAKING 0")
		p.Set(queuepb.WorkerState_DRAINING, "")
		want(t, n, "DRAINING 0")
		p.Set(queuepb.WorkerState_TAKING, "")
		want(t, n, "") // nothing follows upon it
		stop()
		want(t, n, "GONE 0")
	})
}

func TestPresence_tellsOfRunningActionsOnceASecond(t *testing.T) {
	inBubble(t, presence.Options{}, func(p *presence.Presence, n *notices, _ func()) {
		time.Sleep(2 * time.Second)
		n.take()
		p.Add(1)
		want(t, n, "TAKING 1") // the first change after a while at once
		for range 1000 {
			p.Add(1)
			p.Add(-1)
			time.Sleep(time.Millisecond)
		}
		p.Add(1)
		if told := strings.Count(n.take(), "TAKING"); told > 2 {
			t.Errorf("told %d times within a second", told)
		}
		time.Sleep(time.Second + time.Millisecond)
		synctest.Wait()
		if got := n.take(); !strings.HasSuffix(got, "TAKING 2") {
			t.Errorf("told %q, want the last state", got)
		}
		p.Add(-2)
		p.Set(queuepb.WorkerState_PAUSED, "no memory") // which does not wait
		want(t, n, "PAUSED 0 no memory")
	})
}

func TestPresence_saysThatItIsThere(t *testing.T) {
	o := presence.Options{Pools: []string{"a", "b"}, Properties: []platform.Property{{Name: "gpu", Value: "yes"}}}
	inBubble(t, o, func(_ *presence.Presence, n *notices, _ func()) {
		n.take()
		time.Sleep(10 * time.Minute)
		n.mu.Lock()
		defer n.mu.Unlock()
		// 40 times in each of the pools, give or take.
		if len(n.told) < 74 || len(n.told) > 90 {
			t.Errorf("told %d times within 10 minutes", len(n.told))
		}
		s := n.told[0]
		if s.GetLifetime().AsDuration() != 45*time.Second || s.GetSlots() != 4 || s.GetWorker() != "w" || s.GetPool() != "a" || n.told[1].GetPool() != "b" ||
			len(s.GetProperties()) != 1 || s.GetProperties()[0].GetValue() != "yes" {
			t.Errorf("told %v and %v", s, n.told[1])
		}
	})
}

func TestPresence_goesOnWithoutTheBroker(t *testing.T) {
	var log strings.Builder
	inBubble(t, presence.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}, func(p *presence.Presence, n *notices, stop func()) {
		n.take()
		n.fail(errors.New("the broker is away"))
		p.Set(queuepb.WorkerState_PAUSED, "tired")
		for range 1000 { // which is no reason to try a thousand times
			p.Add(1)
			time.Sleep(10 * time.Millisecond)
		}
		n.mu.Lock()
		if n.calls > 15 {
			t.Errorf("told %d times within 10 s", n.calls)
		}
		n.mu.Unlock()
		n.fail(nil)
		time.Sleep(2 * time.Second)
		want(t, n, "PAUSED 1000 tired")
		n.fail(errors.New("the broker is away"))
		stop()
		if got := strings.Count(log.String(), "\n"); got != 3 {
			t.Errorf("the log has %d lines, want one for each change:\n%s", got, log.String())
		}
	})
}

func TestNew_refuses(t *testing.T) {
	n := &notices{}
	for name, o := range map[string]presence.Options{
		"nothing":  {},
		"no pool":  {Notices: n, Worker: "w"},
		"no name":  {Notices: n, Pools: []string{"p"}},
		"negative": {Notices: n, Worker: "w", Pools: []string{"p"}, Slots: -1},
		"backward": {Notices: n, Worker: "w", Pools: []string{"p"}, Every: -1},
	} {
		if _, err := presence.New(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
