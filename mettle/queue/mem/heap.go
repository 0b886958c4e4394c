package mem

// An item of a heap knows its order and its place.
type item[T any] interface {
	before(other T) bool
	// place is where the heap keeps the item's index.
	place() *int
}

// A heap is a binary heap of items that know their places in it, so that each
// can be moved and taken out. The first is at index 0.
type heap[T item[T]] []T

// nowhere is the place of an item that is in no heap.
const nowhere = -1

func (h *heap[T]) push(x T) {
	*x.place() = len(*h)
	*h = append(*h, x)
	h.up(len(*h) - 1)
}

// remove takes out x, which is in h.
func (h *heap[T]) remove(x T) {
	i, last := *x.place(), len(*h)-1
	h.swap(i, last)
	var none T
	(*h)[last] = none
	*h = (*h)[:last]
	if i < last {
		h.fix(i)
	}
	*x.place() = nowhere
	// A heap that was deep once gives its room back.
	if cap(*h) > 64 && len(*h) < cap(*h)/4 {
		*h = append(make(heap[T], 0, cap(*h)/2), *h...)
	}
}

// moved puts x where it belongs after its order has changed.
func (h heap[T]) moved(x T) { h.fix(*x.place()) }

func (h heap[T]) fix(i int) {
	h.down(i)
	h.up(i)
}

func (h heap[T]) swap(i, k int) {
	h[i], h[k] = h[k], h[i]
	*h[i].place(), *h[k].place() = i, k
}

func (h heap[T]) up(i int) {
	for i > 0 {
		parent := (i - 1) / 2
		if !h[i].before(h[parent]) {
			return
		}
		h.swap(i, parent)
		i = parent
	}
}

func (h heap[T]) down(i int) {
	for {
		least := i
		for c := 2*i + 1; c <= 2*i+2 && c < len(h); c++ {
			if h[c].before(h[least]) {
				least = c
			}
		}
		if least == i {
			return
		}
		h.swap(i, least)
		i = least
	}
}
