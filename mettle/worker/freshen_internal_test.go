//go:build linux

package worker

import (
	"testing"

	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// aging is a runner that may be stale, and runs nothing.
type aging struct {
	runner.Runner
	stale, closed bool
}

func (a *aging) Stale() bool { return a.stale }

func (a *aging) Close() error {
	a.closed = true
	return nil
}

func TestRunners_freshen(t *testing.T) {
	var made []*aging
	rs := &runners{make: func(place, []string) (runner.Runner, error) {
		made = append(made, &aging{})
		return made[len(made)-1], nil
	}}
	usual, _ := rs.make(place{}, nil)
	rs.usual = usual
	for _, p := range []place{{}, {network: true}} {
		old, err := rs.of(p, nil)
		if err != nil {
			t.Fatal(err)
		}
		rs.rest()
		if again, err := rs.of(p, nil); err != nil || again != old {
			t.Errorf("%v: another runner, though nothing has changed: %v", p, err)
		}
		rs.rest()
		old.(*aging).stale = true
		fresh, err := rs.of(p, nil)
		if err != nil || fresh == old {
			t.Errorf("%v: a stale runner is used: %v", p, err)
		}
		rs.rest()
		if !old.(*aging).closed || fresh.(*aging).closed {
			t.Errorf("%v: want the stale one closed, and that one alone", p)
		}
	}
	if len(made) != 4 {
		t.Errorf("%d runners were made, want 4", len(made))
	}
}
