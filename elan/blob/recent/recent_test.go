package recent_test

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mettle-build/mettle/elan/blob/recent"
)

func name(i int) []byte { return binary.BigEndian.AppendUint64(nil, uint64(i)) }

func TestSet_window(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := recent.New(100, time.Hour)
		if s.Has(name(1)) {
			t.Error("an empty set has a name")
		}
		at := s.Now()
		time.Sleep(10 * time.Minute)
		if !s.Add(name(1), at) || s.Add(name(1), at) {
			t.Error("a name is new once")
		}
		if !s.Has(name(1)) || s.Has(name(2)) {
			t.Error("the set does not have what was added, and nothing else")
		}
		time.Sleep(50*time.Minute - time.Millisecond)
		if !s.Has(name(1)) {
			t.Error("the name is gone before its time")
		}
		time.Sleep(2 * time.Millisecond) // stamps of one moment are a nanosecond apart
		if s.Has(name(1)) {
			t.Error("the name outlives the window, which began when the question was asked")
		}
		if !s.Add(name(1), s.Now()) || !s.Has(name(1)) {
			t.Error("a name that was over is new again")
		}
	})
}

// An answer that was on its way when its name was forgotten is not believed.
func TestSet_forget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := recent.New(100, time.Hour)
		asked := s.Now()
		s.Forget(name(1))
		s.Add(name(1), asked)
		if s.Has(name(1)) {
			t.Error("an old answer was believed after its name was forgotten")
		}
		// In the bubble no time passes: the order alone counts.
		s.Add(name(1), s.Now())
		if !s.Has(name(1)) {
			t.Error("a new answer was not believed")
		}
		s.Forget(name(1))
		if s.Has(name(1)) {
			t.Error("a forgotten name is there")
		}
	})
}

func TestSet_olderAnswerShortensNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := recent.New(100, time.Hour)
		old := s.Now()
		time.Sleep(30 * time.Minute)
		s.Add(name(1), s.Now())
		s.Add(name(1), old)
		time.Sleep(45 * time.Minute)
		if !s.Has(name(1)) {
			t.Error("an older answer, that came later, replaced a newer one")
		}
	})
}

func TestSet_claim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := recent.New(100, time.Hour)
		var won atomic.Int64
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				if s.Claim(name(1)) {
					won.Add(1)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Errorf("%d won a name, want 1", won.Load())
		}
		s.Forget(name(1))
		if !s.Claim(name(1)) {
			t.Error("a forgotten name can't be claimed")
		}
		time.Sleep(time.Hour + time.Millisecond)
		if !s.Claim(name(1)) {
			t.Error("a name can't be claimed after its window")
		}
	})
}

// The table keeps what is young, and never more than it has room for.
func TestSet_bounded(t *testing.T) {
	const room = 1 << 12
	s := recent.New(room, time.Hour)
	for i := range 10 * room {
		s.Add(name(i), s.Now())
	}
	has := func(from, to int) (n int) {
		for i := from; i < to; i++ {
			if s.Has(name(i)) {
				n++
			}
		}
		return n
	}
	if n := has(0, 10*room); n > room {
		t.Errorf("%d names are remembered, with room for %d", n, room)
	}
	if n := has(9*room+room/2, 10*room); n < room/2*95/100 {
		t.Errorf("of the last %d names %d are remembered", room/2, n)
	}
}

func TestSet_small(t *testing.T) {
	for _, room := range []int{0, 1, 8, 9} {
		s := recent.New(room, time.Hour)
		s.Add(name(1), s.Now())
		if !s.Has(name(1)) {
			t.Errorf("with room for %d, the last name is not remembered", room)
		}
	}
}

func TestSet_concurrent(t *testing.T) {
	s := recent.New(1<<10, time.Hour)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 2000 {
				s.Add(name(i), s.Now())
				if s.Has(name(-1 - i)) {
					t.Errorf("has %d, which nobody added", -1-i)
				}
				if i%100 == g {
					s.Forget(name(i))
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkSet(b *testing.B) {
	s := recent.New(1<<20, time.Hour)
	key := make([]byte, 80)
	b.Run("add", func(b *testing.B) {
		b.ReportAllocs()
		at, i := s.Now(), uint64(0)
		for b.Loop() {
			i++
			binary.BigEndian.PutUint64(key, i%(1<<19))
			s.Add(key, at)
		}
	})
	b.Run("has", func(b *testing.B) {
		b.ReportAllocs()
		i := uint64(0)
		for b.Loop() {
			i++
			binary.BigEndian.PutUint64(key, i%(1<<19))
			s.Has(key)
		}
	})
}
