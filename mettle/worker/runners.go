//go:build linux

package worker

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/mettle-build/mettle/mettle/worker/image"
	"github.com/mettle-build/mettle/mettle/worker/persistent"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
)

// maxPlaces bounds the unusual places that a slot keeps a runner for, each of which
// is a process.
const maxPlaces = 4

// runners are those of one slot, a runner for each place. They are used by the
// slot's goroutine, but for dropImages.
type runners struct {
	usual runner.Runner
	make  func(place, []string) (runner.Runner, error)

	mu     sync.Mutex // guards the rest
	others []runnerAt // the one used last at the end
	busy   *runnerAt  // the one of others that runs a command; nil: none does
}

type runnerAt struct {
	place
	runner.Runner
	image *image.Image // of the place; it stays as long as the runner
}

func (r *runnerAt) close() error {
	err := r.Close()
	if r.image != nil {
		r.image.Close()
	}
	return err
}

// newRunners makes the usual one.
func newRunners(o *Options, slot int, user helper.User) (*runners, error) {
	rs := &runners{make: func(p place, layers []string) (runner.Runner, error) {
		if o.Runner != nil {
			return o.Runner(slot)
		}
		return o.newRunner(user, p, layers)
	}}
	var err error
	if rs.usual, err = rs.make(place{}, nil); err == nil {
		o.slots.add(rs)
	}
	return rs, err
}

// find looks for the runner of a place. The mutex is held.
func (rs *runners) find(p place) int {
	return slices.IndexFunc(rs.others, func(r runnerAt) bool { return r.place == p })
}

// has reports whether there is a runner for p, which stays until rest is called if
// it is one for an image.
func (rs *runners) has(p place) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	i := rs.find(p)
	if i >= 0 {
		rs.busy = &runnerAt{place: p}
	}
	return i >= 0
}

// of is the runner for a place, which is made if need be, and then takes img over,
// which is the one of the place, if that has one. Afterwards comes rest.
func (rs *runners) of(p place, img *image.Image) (runner.Runner, error) {
	if p == (place{}) {
		return rs.usual, nil
	}
	found, oldest := rs.use(p)
	if found != nil {
		if img != nil {
			img.Close()
		}
		return found, nil
	}
	if oldest != nil {
		if err := oldest.close(); err != nil {
			return nil, fmt.Errorf("end the runner of another place: %w", err)
		}
	}
	at := runnerAt{place: p, image: img}
	var layers []string
	if img != nil {
		layers = img.Layers
	}
	var err error
	if at.Runner, err = rs.make(p, layers); err != nil {
		if img != nil {
			img.Close()
		}
		return nil, err
	}
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.others = append(rs.others, at)
	rs.busy = &at
	return at.Runner, nil
}

// use finds the runner for a place, or else, where there are too many to make it,
// the one that was not used for the longest time, which is no longer one of them.
func (rs *runners) use(p place) (found runner.Runner, oldest *runnerAt) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if i := rs.find(p); i >= 0 {
		r := rs.others[i]
		rs.others = append(slices.Delete(rs.others, i, i+1), r)
		rs.busy = &r
		return r.Runner, nil
	}
	if len(rs.others) < maxPlaces {
		return nil, nil
	}
	r := rs.others[0]
	rs.others = slices.Delete(rs.others, 0, 1)
	return nil, &r
}

// rest says that the runner that of has returned runs nothing for now.
func (rs *runners) rest() {
	rs.mu.Lock()
	rs.busy = nil
	rs.mu.Unlock()
}

// dropImages ends the runners in images that run nothing, so that the images can be
// removed. It may be called by any slot.
func (rs *runners) dropImages() error {
	rs.mu.Lock()
	var idle []runnerAt
	rs.others = slices.DeleteFunc(rs.others, func(r runnerAt) bool {
		drop := r.image != nil && (rs.busy == nil || rs.busy.place != r.place)
		if drop {
			idle = append(idle, r)
		}
		return drop
	})
	rs.mu.Unlock()
	var err error
	for _, r := range idle {
		err = errors.Join(err, r.close())
	}
	return err
}

func (rs *runners) close() error {
	err := rs.usual.Close()
	rs.mu.Lock()
	others := rs.others
	rs.others = nil
	rs.mu.Unlock()
	for _, r := range others {
		err = errors.Join(err, r.close())
	}
	return err
}

// renew starts the usual one anew, and ends the others.
func (rs *runners) renew() error {
	if err := rs.close(); err != nil {
		return err
	}
	usual, err := rs.make(place{}, nil)
	if err == nil {
		rs.usual = usual
	}
	return err
}

// allRunners are those of all slots.
type allRunners struct {
	mu    sync.Mutex // guards the rest
	all   []*runners
	tools []*persistent.Pool
}

func (a *allRunners) add(rs *runners) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, rs)
}

func (a *allRunners) addTools(p *persistent.Pool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tools = append(a.tools, p)
}

// dropTools ends the tools that are kept running and have nothing to do. The function
// that it returns waits for that.
func (a *allRunners) dropTools() (wait func()) {
	a.mu.Lock()
	tools := slices.Clone(a.tools)
	a.mu.Unlock()
	waits := make([]func(), len(tools))
	for i, p := range tools {
		waits[i] = p.Shrink()
	}
	return func() {
		for _, wait := range waits {
			wait()
		}
	}
}

func (a *allRunners) dropImages() error {
	a.mu.Lock()
	all := slices.Clone(a.all)
	a.mu.Unlock()
	a.dropTools()()
	var err error
	for _, rs := range all {
		err = errors.Join(err, rs.dropImages())
	}
	return err
}
