package gate

import "time"

// SetWeigh has g take f for what is alive on the heap. It is called before Run is.
func (g *Gate) SetWeigh(f func() int64) {
	g.weigh = func(int64) (int64, bool) { return f(), true }
}

// Calls is how many are going on.
func (g *Gate) Calls() int64 { return g.calls.Load() }

// Ticks is how many there have been, and Share what each connection may have.
func (g *Gate) Ticks() int64 { return g.ticks.Load() }
func (g *Gate) Share() int64 { return g.share.Load() }

// Limit is how much memory may be in use.
func (g *Gate) Limit() int64 { return g.o.MaxMemoryBytes }

// Weigh weighs the memory of this process, the last time after a collection.
func Weigh(limit int64, times int) (live int64, fresh int) {
	m := newMemory()
	for range times {
		var now bool
		if live, now = m.weigh(limit); now {
			fresh++
		}
		m.collected, m.took = time.Time{}, 0
	}
	return live, fresh
}

// Connections is how many there are.
func (g *Gate) Connections() int { return g.connected() }

// For the tests of what they do.
const (
	MaxUnsent  = maxUnsent
	MinShare   = minShare
	WeighEvery = weighEvery
)

// Batches is how many work at once for a connection.
func Batches() int { return places(Batch, placesMemory) }

// MachineMemory is machineMemory.
func MachineMemory(root string) int64 { return machineMemory(root) }

// SetBatch makes one method a Batch, and no other.
func SetBatch(o *Options, method string) { o.Kinds = map[string]Kind{method: Batch} }
