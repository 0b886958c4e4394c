package pubsub

// fifo is a map that forgets the oldest of its keys where there would be too
// many. It is for one goroutine at a time.
type fifo[V any] struct {
	max   int
	m     map[string]entry[V]
	order []place // as they came; those that were deleted since are passed over
	next  uint64
}

type entry[V any] struct {
	v  V
	at uint64
}

type place struct {
	key string
	at  uint64
}

func newFIFO[V any](maxKeys int) *fifo[V] {
	return &fifo[V]{max: maxKeys, m: make(map[string]entry[V])}
}

func (f *fifo[V]) get(key string) (V, bool) {
	e, ok := f.m[key]
	return e.v, ok
}

// put adds key as the newest, or sets its value and leaves it where it is.
func (f *fifo[V]) put(key string, v V) {
	if e, ok := f.m[key]; ok {
		e.v = v
		f.m[key] = e
		return
	}
	f.next++
	f.m[key] = entry[V]{v: v, at: f.next}
	f.order = append(f.order, place{key: key, at: f.next})
	for len(f.m) > f.max {
		oldest := f.order[0]
		f.order = f.order[1:]
		if e, ok := f.m[oldest.key]; ok && e.at == oldest.at {
			delete(f.m, oldest.key)
		}
	}
	if len(f.order) > 2*len(f.m)+64 {
		f.compact()
	}
}

func (f *fifo[V]) remove(key string) { delete(f.m, key) }

// compact forgets the places of the keys that are gone.
func (f *fifo[V]) compact() {
	kept := make([]place, 0, len(f.m))
	for _, p := range f.order {
		if e, ok := f.m[p.key]; ok && e.at == p.at {
			kept = append(kept, p)
		}
	}
	f.order = kept
}
