package wire_test

import (
	"sync"
	"testing"

	"google.golang.org/grpc/mem"

	"github.com/mettle-build/mettle/elan/wire"
)

// poisonPool overwrites what it gives and what it gets back, and counts, so that
// who reads what he has not written, or keeps what he gave up, is found out.
type poisonPool struct {
	mu  sync.Mutex
	out int // buffers that are not given back
}

const poison = 0xdb

func (p *poisonPool) Get(n int) *[]byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.out++
	b := make([]byte, n, max(n, 2<<10)) // gRPC does not count references to less
	overwrite(b)
	return &b
}

func (p *poisonPool) Put(b *[]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.out--
	overwrite((*b)[:cap(*b)])
}

func overwrite(b []byte) {
	for i := range b {
		b[i] = poison
	}
}

func (p *poisonPool) check(t testing.TB) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.out != 0 {
		t.Fatalf("%d buffers were not given back, or more than once", p.out)
	}
}

// slice cuts a copy of data into buffers of n bytes.
func (p *poisonPool) slice(data []byte, n int) mem.BufferSlice {
	var s mem.BufferSlice
	for n = max(n, 1); len(data) > 0; data = data[min(n, len(data)):] {
		b := p.Get(min(n, len(data)))
		copy(*b, data)
		s = append(s, mem.NewBuffer(b, p))
	}
	return s
}

func TestPool(t *testing.T) {
	p := wire.NewPool()
	for _, n := range []int{0, 1, 4096, 4097, 16 << 10, 1 << 20, 1<<20 + 64, 1<<20 + 65, 4 << 20, 5 << 20, 20 << 20} {
		for range 3 {
			b := p.Get(n)
			if len(*b) != n {
				t.Fatalf("Get(%d): %d bytes", n, len(*b))
			}
			*b = (*b)[:n/2] // a prefix may be given back
			p.Put(b)
		}
	}
	foreign := make([]byte, 5000)
	p.Put(&foreign)
	if b := p.Get(4097); cap(*b) == cap(foreign) {
		t.Error("a buffer of another size is in use")
	}
}
