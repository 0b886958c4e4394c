package gate

// SetWeigh has g take f for what is alive on the heap. It is called before Run is.
func (g *Gate) SetWeigh(f func(limit int64) int64) { g.weigh = f }

// Calls is how many are going on.
func (g *Gate) Calls() int64 { return g.calls.Load() }

// Connections is how many there are.
func (g *Gate) Connections() int { return g.connected() }

// For the tests of what they do.
const (
	MaxBatches = maxBatches
	MinShare   = minShare
	WeighEvery = weighEvery
)

// MachineMemory is machineMemory.
func MachineMemory(root string) int64 { return machineMemory(root) }
