package operation_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mettle-build/mettle/mettle/operation"
)

// Names that were cancelled are remembered for a while, and not without bound.
func TestRegistry_Cancel_remembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := start(t, operation.RegistryOptions{KeepFinished: time.Minute})
		first := name("a")
		if got := r.Cancel(first); got != operation.NotHeld {
			t.Errorf("Cancel of a name that nobody has is %v", got)
		}
		w, created := r.Join(first, operation.Mergeable)
		if s, _ := w.Watch(); created || !errors.Is(s.Err, operation.ErrCancelled) {
			t.Errorf("Join after Cancel: created is %v, state %+v", created, s)
		}
		r.Leave(w)
		time.Sleep(59 * time.Second)
		if !r.Cancelled(first) {
			t.Error("it is forgotten too early")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if r.Cancelled(first) {
			t.Error("it is never forgotten")
		}

		const bound = 1 << 16
		first = name("b")
		r.Cancel(first)
		var last operation.Name
		for range bound {
			last = operation.NewName(first)
			r.Cancel(last)
		}
		if r.Cancelled(first) || !r.Cancelled(last) {
			t.Errorf("after %d more, the first is remembered: %v, the last: %v", bound, r.Cancelled(first), r.Cancelled(last))
		}
	})
}

// A name of an operation that goes on for others stays cancelled as long as that
// is there.
func TestRegistry_Cancel_oneOfTwo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := start(t, operation.RegistryOptions{KeepFinished: time.Minute})
		a, b := name("x"), name("x")
		first, _ := r.Join(a, operation.Mergeable)
		r.Published(first, nil)
		second, created := r.Join(b, operation.Mergeable)
		if created {
			t.Fatal("they are not merged")
		}
		_, changed := second.Watch()
		if got := r.Cancel(a); got != operation.Held {
			t.Errorf("Cancel is %v", got)
		}
		<-changed
		time.Sleep(time.Hour)
		again, _ := r.Find(a)
		if s, _ := again.Watch(); !errors.Is(s.Err, operation.ErrCancelled) {
			t.Errorf("an hour later it is in %v", s.Stage)
		}
		r.Leave(again)
		r.Leave(first) // a slow client of before
		if stage(second) != operation.Queued || w.take() != nil {
			t.Errorf("the other is in %v", stage(second))
		}
		r.Cancel(b)
		synctest.Wait()
		if got := w.take(); len(got) != 1 || got[0] != first.Job() {
			t.Errorf("%v were withdrawn", got)
		}
	})
}

// What takes a cancellation back does not shorten the next one.
func TestRegistry_Cancel_twice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := start(t, operation.RegistryOptions{KeepFinished: time.Minute})
		n := name("a")
		r.Cancel(n)
		r.Uncancel(n)
		time.Sleep(30 * time.Second)
		r.Cancel(n)
		time.Sleep(59 * time.Second)
		if !r.Cancelled(n) {
			t.Error("it is forgotten too early")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if r.Cancelled(n) {
			t.Error("it is never forgotten")
		}
	})
}

// One who begins and cancels without end, while another waits for the same
// action, fills no memory.
func TestRegistry_Cancel_withoutEnd(t *testing.T) {
	r, _ := start(t, operation.RegistryOptions{})
	first, _ := r.Join(name("a"), operation.Mergeable)
	r.Published(first, nil)
	const n = 2000
	for range n {
		w, created := r.Join(operation.NewName(name("a")), operation.Mergeable)
		if created {
			t.Fatal("they are not merged")
		}
		parsed, err := operation.ParseName(operation.Text(w))
		if err != nil {
			t.Fatal(err)
		}
		r.Cancel(parsed)
		if s, _ := w.Watch(); !errors.Is(s.Err, operation.ErrCancelled) {
			t.Fatalf("the one that was cancelled is in %v", s.Stage)
		}
		r.Leave(w)
	}
	if got := operation.Names(first); got > n/2 {
		t.Errorf("the operation is known by %d names after %d were cancelled", got, n)
	}
	if stage(first) != operation.Queued {
		t.Errorf("the other is in %v", stage(first))
	}
}

// A page is found again though almost all that was before it has gone.
func TestRegistry_List_afterMany(t *testing.T) {
	r, _ := start(t, operation.RegistryOptions{})
	const n = 10_000
	var kept []string
	var place uint64
	for i := range n {
		w, _ := r.Join(operation.NewName(name("a")), operation.NotMergeable)
		if i%100 == 0 {
			kept = append(kept, w.Job())
			r.List(place, func(l operation.Listed) bool { place = l.Place; return true })
			continue
		}
		r.Published(w, errors.New("down")) // and so it is forgotten
	}
	var got []string
	var middle uint64
	r.List(0, func(l operation.Listed) bool {
		got = append(got, l.Names...)
		if len(got) == len(kept)/2 {
			middle = l.Place
		}
		return true
	})
	if len(got) != len(kept) || got[0] != kept[0] || got[len(got)-1] != kept[len(kept)-1] {
		t.Errorf("%d operations are listed, want %d", len(got), len(kept))
	}
	count := 0
	r.List(middle, func(operation.Listed) bool { count++; return count < 7 })
	if count != 7 {
		t.Errorf("visit was called %d times after it had enough at 7", count)
	}
}
