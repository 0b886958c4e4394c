package wire

import (
	"sync"

	"google.golang.org/grpc/mem"
)

// headerRoom is more than what stands around the bytes of a blob in a message.
const headerRoom = 64

// Pool keeps buffers for their next use, until the garbage collector takes them.
// Unlike gRPC's own it does not clear them, so that its users write a buffer
// before they read it, and send nothing of it that they have not written. It is
// safe for concurrent use.
type Pool struct{ tiers [len(tierBytes)]sync.Pool }

// tierBytes are the sizes of buffers: one that takes a frame of HTTP/2, one for a
// MiB of a blob in a message, one for the largest message that clients take by
// default, and those that fill the gaps. What is larger is not kept.
//
//nolint:gochecknoglobals // an immutable table
var tierBytes = [...]int{4 << 10, 16 << 10, 64 << 10, 256 << 10, 1<<20 + headerRoom, 4<<20 + headerRoom}

var _ mem.BufferPool = (*Pool)(nil)

// NewPool returns an empty Pool.
func NewPool() *Pool { return &Pool{} }

// Get implements mem.BufferPool.
func (p *Pool) Get(n int) *[]byte {
	for i, size := range tierBytes {
		if n > size {
			continue
		}
		if b, ok := p.tiers[i].Get().(*[]byte); ok {
			*b = (*b)[:n]
			return b
		}
		b := make([]byte, n, size)
		return &b
	}
	b := make([]byte, n)
	return &b
}

// Put implements mem.BufferPool.
func (p *Pool) Put(b *[]byte) {
	for i, size := range tierBytes {
		if cap(*b) == size {
			p.tiers[i].Put(b)
			return
		}
	}
}
