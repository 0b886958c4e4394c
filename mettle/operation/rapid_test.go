package operation_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/mettle-build/mettle/mettle/operation"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// model is what must be true of one operation.
type model struct {
	op      *operation.Operation
	name    operation.Name
	waiters int
	attempt uint32
	ended   bool
	result  string
	left    time.Time // when the last waiter left
}

// registryMachine drives a Registry and a simple model of it side by side.
type registryMachine struct {
	r   *operation.Registry
	w   *withdrawals
	all []*model
}

const abandonAfter = time.Minute

func (m *registryMachine) pick(t *rapid.T) *model {
	if len(m.all) == 0 {
		t.Skip("nothing there")
	}
	return m.all[rapid.IntRange(0, len(m.all)-1).Draw(t, "operation")]
}

func (m *registryMachine) join(t *rapid.T) {
	n := name(rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "action"))
	op, created := m.r.Join(n, operation.Mergeable)
	if created {
		for _, o := range m.all {
			if !o.ended && o.name.Action == n.Action {
				t.Fatalf("%s was not merged with %s", n, o.op.Name())
			}
		}
		m.all = append(m.all, &model{op: op, name: n, waiters: 1})
		if rapid.IntRange(0, 4).Draw(t, "publish fails") == 0 {
			m.r.Published(op, errors.New("down"))
			m.all[len(m.all)-1].ended = true
		} else {
			m.r.Published(op, nil)
		}
		return
	}
	for _, o := range m.all {
		if o.op == op {
			if o.ended {
				t.Fatalf("merged with %s, which has ended", op.Name())
			}
			o.waiters++
			return
		}
	}
	t.Fatalf("merged with an operation that was never made")
}

func (m *registryMachine) find(t *rapid.T) {
	o := m.pick(t)
	op, ok := m.r.Find(o.name)
	if !o.ended && (!ok || op != o.op) {
		t.Fatalf("%s, which is in flight, is not found", o.op.Name())
	}
	for _, p := range m.all {
		if ok && p.op == op {
			p.waiters++
		}
	}
}

func (m *registryMachine) leave(t *rapid.T) {
	o := m.pick(t)
	if o.waiters == 0 {
		t.Skip("nobody waits")
	}
	m.r.Leave(o.op)
	if o.waiters--; o.waiters == 0 {
		o.left = time.Now()
	}
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
		due := !o.ended && o.waiters == 0 && time.Since(o.left) >= abandonAfter
		if due != withdrawn[o.op.Name()] && !o.ended {
			t.Fatalf("%s: withdrawn is %v, want %v", o.op.Name(), withdrawn[o.op.Name()], due)
		}
		o.ended = o.ended || due
	}
}

func (m *registryMachine) check(t *rapid.T) {
	running := 0
	for _, o := range m.all {
		s, _ := o.op.Watch()
		if s.Ended() != o.ended {
			t.Fatalf("%s: stage is %v, ended should be %v", o.op.Name(), s.Stage, o.ended)
		}
		if o.result != "" && string(s.Response) != o.result {
			t.Fatalf("%s: response is %s, want %s", o.op.Name(), s.Response, o.result)
		}
		if !o.ended && s.Attempt != o.attempt {
			t.Fatalf("%s: attempt is %d, want %d", o.op.Name(), s.Attempt, o.attempt)
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
			r, err := operation.NewRegistry(operation.RegistryOptions{Jobs: w, AbandonAfter: abandonAfter})
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
			m := &registryMachine{r: r, w: w}
			rt.Repeat(map[string]func(*rapid.T){
				"join": m.join, "find": m.find, "leave": m.leave,
				"execute": m.execute, "complete": m.complete, "pass": m.pass,
				"": m.check,
			})
		})
	})
}
