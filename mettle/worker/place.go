//go:build linux

package worker

import (
	"errors"
	"fmt"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/mettle/command"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
)

// place is what an action may choose of where it runs. The zero place is the usual
// one.
type place struct {
	network bool // that of the worker
}

// Properties by which an action chooses.
const (
	networkProperty = "network"
	externalNetwork = "external"
)

// platformOf is the action's platform, and that of older clients' commands.
func platformOf(a *repb.Action, c *repb.Command) *repb.Platform {
	if p := a.GetPlatform(); p != nil {
		return p
	}
	return c.GetPlatform() // clients of API 2.1 and before
}

// placeOf is what the action's platform asks for: it is the action's, and of older
// clients the command's.
func (o *Options) placeOf(a *repb.Action, c *repb.Command) (place, error) {
	var p place
	for _, pr := range platformOf(a, c).GetProperties() {
		if pr.GetName() == networkProperty && pr.GetValue() == externalNetwork {
			p.network = true
		}
	}
	if p.network && o.sandboxed && !o.AllowNetwork {
		return place{}, fmt.Errorf("%w: the action asks for %s=%s, which this worker does not give to actions", command.ErrInvalid, networkProperty, externalNetwork)
	}
	if !o.sandboxed {
		p.network = false // there is one place
	}
	return p, nil
}

// maxPlaces bounds the unusual places that a slot keeps a runner for, each of which
// is a process.
const maxPlaces = 4

// runners are those of one slot, a runner for each place. They are used by the
// slot's goroutine.
type runners struct {
	usual  runner.Runner
	make   func(place) (runner.Runner, error)
	others []runnerAt // the one used last at the end
}

type runnerAt struct {
	place
	runner.Runner
}

// newRunners makes the usual one.
func newRunners(o *Options, slot int, user helper.User) (*runners, error) {
	rs := &runners{make: func(p place) (runner.Runner, error) {
		if o.Runner != nil {
			return o.Runner(slot)
		}
		return o.newRunner(user, p)
	}}
	var err error
	rs.usual, err = rs.make(place{})
	return rs, err
}

// of is the runner for a place, which is made if need be.
func (rs *runners) of(p place) (runner.Runner, error) {
	if p == (place{}) {
		return rs.usual, nil
	}
	if i := slices.IndexFunc(rs.others, func(r runnerAt) bool { return r.place == p }); i >= 0 {
		r := rs.others[i]
		rs.others = append(slices.Delete(rs.others, i, i+1), r)
		return r.Runner, nil
	}
	if len(rs.others) == maxPlaces {
		oldest := rs.others[0]
		rs.others = slices.Delete(rs.others, 0, 1)
		if err := oldest.Close(); err != nil {
			return nil, fmt.Errorf("end the runner of another place: %w", err)
		}
	}
	r, err := rs.make(p)
	if err != nil {
		return nil, err
	}
	rs.others = append(rs.others, runnerAt{p, r})
	return r, nil
}

func (rs *runners) close() error {
	err := rs.usual.Close()
	for _, r := range rs.others {
		err = errors.Join(err, r.Close())
	}
	rs.others = nil
	return err
}
