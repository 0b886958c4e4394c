package mem

// fences are the numbers of the last deliveries of jobs that were withdrawn, by
// operation. A job that is published again counts on from there: what is still
// reported of the one before is not about it, and is known by its number. The zero
// fences are none. They are guarded by Queue.mu.
type fences struct {
	attempts map[string]uint32
	order    []string // the oldest first; some may be gone
}

// maxFences bounds fences.attempts. A late report comes within seconds.
const maxFences = 1 << 14

// put keeps the last attempt of an operation, if there was one.
func (f *fences) put(operation string, attempt uint32) {
	if attempt == 0 {
		return
	}
	if f.attempts == nil {
		f.attempts = make(map[string]uint32)
	}
	f.attempts[operation] = max(attempt, f.attempts[operation])
	f.order = append(f.order, operation)
	if len(f.order) > maxFences {
		delete(f.attempts, f.order[0])
		f.order = f.order[1:]
	}
}

// take is the last attempt of an operation, 0 if there is none.
func (f *fences) take(operation string) uint32 {
	attempt := f.attempts[operation]
	delete(f.attempts, operation)
	return attempt
}
