package operation_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/mettle-build/mettle/mettle/operation"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// model is what must be true of one operation.
type model struct {
	op      *operation.Wait // of the client that created it
	action  string
	clients []client // that wait
	attempt uint32
	ended   bool
	result  string
	left    time.Time // when the last client left
}

// client is one that waits, or has waited, by a name of its own.
type client struct {
	name operation.Name
	wait *operation.Wait
}

// registryMachine drives a Registry and a simple model of it side by side.
type registryMachine struct {
	r         *operation.Registry
	w         *withdrawals
	all       []*model
	names     []client // all that were given, with what they waited for last
	cancelled map[operation.Name]bool
	withdrawn map[string]bool // what must be withdrawn the next time that somebody looks
}

const abandonAfter = time.Minute

func (m *registryMachine) pick(t *rapid.T) *model {
	if len(m.all) == 0 {
		t.Skip("nothing there")
	}
	return m.all[rapid.IntRange(0, len(m.all)-1).Draw(t, "operation")]
}

func (m *registryMachine) join(t *rapid.T) {
	action := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "action")
	n := name(action)
	w, created := m.r.Join(n, operation.Mergeable)
	m.names = append(m.names, client{n, w})
	if !created {
		m.joined(t, client{n, w})
		return
	}
	for _, o := range m.all {
		if !o.ended && o.action == action {
			t.Fatalf("%s was not merged with %s", n, o.op.Job())
		}
	}
	o := &model{op: w, action: action, clients: []client{{n, w}}}
	m.all = append(m.all, o)
	var err error
	if rapid.IntRange(0, 4).Draw(t, "publish fails") == 0 {
		err, o.ended = errors.New("down"), true
	}
	m.r.Published(w, err)
}

// joined counts one client more of an operation that is there.
func (m *registryMachine) joined(t *rapid.T, c client) {
	for _, o := range m.all {
		if o.op.Job() == c.wait.Job() {
			o.clients = append(o.clients, c)
			return
		}
	}
	t.Fatalf("merged with an operation that was never made")
}

// find is a client that comes back.
func (m *registryMachine) find(t *rapid.T) {
	if len(m.names) == 0 {
		t.Skip("nobody was there")
	}
	i := rapid.IntRange(0, len(m.names)-1).Draw(t, "name")
	c := m.names[i]
	w, ok := m.r.Find(c.name)
	if m.cancelled[c.name] {
		if s, _ := w.Watch(); !ok || !errors.Is(s.Err, operation.ErrCancelled) {
			t.Fatalf("%s, which was cancelled, is found in %v", c.name, s.Stage)
		}
		return
	}
	for _, o := range m.all {
		if !o.ended && o.action == m.actionOf(c) && !ok {
			t.Fatalf("%s, which is in flight, is not found", c.name)
		}
	}
	if ok {
		m.names[i].wait = w
		m.joined(t, client{c.name, w})
	}
}

func (m *registryMachine) actionOf(c client) string {
	for _, a := range []string{"a", "b", "c"} {
		if name(a).Action == c.name.Action {
			return a
		}
	}
	return ""
}

func (m *registryMachine) leave(t *rapid.T) {
	o := m.pick(t)
	if len(o.clients) == 0 {
		t.Skip("nobody waits")
	}
	i := rapid.IntRange(0, len(o.clients)-1).Draw(t, "client")
	m.r.Leave(o.clients[i].wait)
	o.clients = slices.Delete(o.clients, i, i+1)
	if len(o.clients) == 0 {
		o.left = time.Now()
	}
}

// cancel is a client that wants no result any more. It has left when it hears of
// the end.
func (m *registryMachine) cancel(t *rapid.T) {
	if len(m.names) == 0 {
		t.Skip("nobody was there")
	}
	c := rapid.SampledFrom(m.names).Draw(t, "name")
	before := m.known(c)
	held := m.r.Cancel(c.name)
	if before == nil {
		m.cancelled[c.name] = m.cancelled[c.name] || m.r.Cancelled(c.name)
		return
	}
	if held != operation.Held {
		t.Fatalf("%s, which is in flight, is not held", c.name)
	}
	m.cancelled[c.name] = true
	var rest []client
	for _, other := range before.clients {
		if other.name != c.name {
			rest = append(rest, other)
			if s, _ := other.wait.Watch(); errors.Is(s.Err, operation.ErrCancelled) {
				t.Fatalf("%s is cancelled, it was %s that should be", other.name, c.name)
			}
			continue
		}
		if s, _ := other.wait.Watch(); !errors.Is(s.Err, operation.ErrCancelled) {
			t.Fatalf("%s is in %v after it was cancelled", c.name, s.Stage)
		}
		m.r.Leave(other.wait)
	}
	before.clients = rest
	if len(rest) == 0 {
		before.ended = true
		m.withdrawn[before.op.Job()] = true
	}
}

// known is the operation in flight that is known by that name.
func (m *registryMachine) known(c client) *model {
	for _, o := range m.all {
		if o.ended || m.cancelled[c.name] {
			continue
		}
		for _, w := range append(slices.Clone(o.clients), m.names...) {
			if w.name == c.name && w.wait.Job() == o.op.Job() {
				return o
			}
		}
	}
	return nil
}

func (m *registryMachine) execute(t *rapid.T) {
	o := m.pick(t)
	attempt := rapid.Uint32Range(1, 4).Draw(t, "attempt")
	m.r.Update(update(o.op, attempt, queuepb.Update_EXECUTING, fmt.Sprint("w", attempt)))
	if !o.ended {
		o.attempt = max(o.attempt, attempt)
	}
}

func (m *registryMachine) complete(t *rapid.T) {
	o := m.pick(t)
	attempt := rapid.Uint32Range(1, 4).Draw(t, "attempt")
	worker := fmt.Sprint("w", attempt)
	m.r.Update(update(o.op, attempt, queuepb.Update_COMPLETED, worker))
	if !o.ended && attempt >= o.attempt {
		o.ended, o.result, o.attempt = true, worker, attempt
	}
}

// pass lets time go by, and with it what nobody waits for.
func (m *registryMachine) pass(t *rapid.T) {
	time.Sleep(time.Duration(rapid.IntRange(1, 80).Draw(t, "seconds")) * time.Second)
	synctest.Wait()
	withdrawn := make(map[string]bool)
	for _, name := range m.w.take() {
		withdrawn[name] = true
	}
	for _, o := range m.all {
		due := !o.ended && len(o.clients) == 0 && time.Since(o.left) >= abandonAfter
		if want := due || m.withdrawn[o.op.Job()]; want != withdrawn[o.op.Job()] && (want || !o.ended) {
			t.Fatalf("%s: withdrawn is %v, want %v", o.op.Job(), withdrawn[o.op.Job()], want)
		}
		o.ended = o.ended || due
	}
	clear(m.withdrawn)
}

// listed checks that the list has all that are in flight, in their order.
func (m *registryMachine) listed(t *rapid.T) {
	var got []string
	var last uint64
	m.r.List(0, func(l operation.Listed) bool {
		if l.Place <= last {
			t.Fatalf("place %d is listed after %d", l.Place, last)
		}
		last = l.Place
		if !l.Snapshot.Ended() {
			got = append(got, l.Names...)
		}
		return true
	})
	for _, o := range m.all {
		for _, c := range append(slices.Clone(o.clients), client{wait: o.op}) {
			if c.wait == o.op {
				s, _ := o.op.Watch()
				if !o.ended && !errors.Is(s.Err, operation.ErrCancelled) && !slices.Contains(got, o.op.Job()) {
					t.Fatalf("%s, which is in flight, is not in the list", o.op.Job())
				}
			} else if !o.ended && !slices.Contains(got, c.name.String()) {
				t.Fatalf("%s, by which a client waits, is not in the list", c.name)
			}
		}
	}
}

func (m *registryMachine) check(t *rapid.T) {
	m.listed(t)
	running := 0
	for _, o := range m.all {
		s := operation.State(o.op)
		if s.Ended() != o.ended {
			t.Fatalf("%s: stage is %v, ended should be %v", o.op.Job(), s.Stage, o.ended)
		}
		if o.result != "" && string(s.Response) != o.result {
			t.Fatalf("%s: response is %s, want %s", o.op.Job(), s.Response, o.result)
		}
		if !o.ended && s.Attempt != o.attempt {
			t.Fatalf("%s: attempt is %d, want %d", o.op.Job(), s.Attempt, o.attempt)
		}
		if !o.ended {
			running++
		}
	}
	if q, x := m.r.Counts(); q+x != running {
		t.Fatalf("%d are queued and %d executing, want %d in all", q, x, running)
	}
}

func TestRegistry_againstModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		synctest.Test(t, func(t *testing.T) {
			w := &withdrawals{}
			r, err := operation.NewRegistry(operation.RegistryOptions{Jobs: w, AbandonAfter: abandonAfter, KeepFinished: 24 * time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error)
			go func() { ended <- r.Run(ctx) }()
			defer func() {
				cancel()
				if err := <-ended; err != nil {
					t.Error(err)
				}
			}()
			m := &registryMachine{r: r, w: w, cancelled: make(map[operation.Name]bool), withdrawn: make(map[string]bool)}
			rt.Repeat(map[string]func(*rapid.T){
				"join": m.join, "find": m.find, "leave": m.leave,
				"cancel":  m.cancel,
				"execute": m.execute, "complete": m.complete, "pass": m.pass,
				"": m.check,
			})
		})
	})
}
