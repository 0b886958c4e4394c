//go:build linux

package worker

import (
	"slices"
	"sync"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
	"github.com/mettle-build/mettle/mettle/worker/output"
	"github.com/mettle-build/mettle/mettle/worker/persistent"
)

// station is where inputs come from and outputs go to. What it remembers of blobs
// is of one store, so that a job sees nothing of another instance's where each
// has a store of its own.
type station struct {
	store     blob.Store
	builder   *inputroot.Builder
	collector *output.Collector
	// Those of tools that are kept running. nil: none are.
	inputs *persistent.Inputs
	copier *output.Collector
}

func newStation(o *Options, store blob.Store, policy inputroot.LinkPolicy) (*station, error) {
	builder, err := inputroot.New(inputroot.Options{Store: store, Policy: policy})
	if err != nil {
		return nil, err
	}
	collector, err := output.New(output.Options{Store: store})
	if err != nil {
		return nil, err
	}
	s := &station{store: store, builder: builder, collector: collector}
	if o.keepsTools() {
		err = s.forPersistent(policy)
	}
	return s, err
}

// maxStations bounds the instances that a worker remembers anything of: each has
// up to 20 MB of decoded Directories.
const maxStations = 16

// stations are the stations of all slots, by instance.
type stations struct {
	o      *Options
	stores func(instance string) blob.Store // nil: shared is for all instances
	policy inputroot.LinkPolicy
	shared *station

	// mu guards used, the stations by instance, the one used last at the end.
	mu   sync.Mutex
	used []instanceStation
}

type instanceStation struct {
	instance string
	*station
}

func newStations(o *Options, policy inputroot.LinkPolicy) (*stations, error) {
	s := &stations{o: o, stores: o.Stores, policy: policy}
	var err error
	if s.stores == nil {
		s.shared, err = newStation(o, o.Store, policy)
	}
	return s, err
}

// of is the station of an instance's jobs.
func (s *stations) of(instance string) (*station, error) {
	if s.shared != nil {
		return s.shared, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.used, func(u instanceStation) bool { return u.instance == instance })
	var u instanceStation
	if i >= 0 {
		u = s.used[i]
		s.used = slices.Delete(s.used, i, i+1)
	} else {
		at, err := newStation(s.o, s.stores(instance), s.policy)
		if err != nil {
			return nil, err
		}
		u = instanceStation{instance, at}
		if len(s.used) == maxStations {
			s.used = slices.Delete(s.used, 0, 1)
		}
	}
	s.used = append(s.used, u)
	return u.station, nil
}
