package wire

import "google.golang.org/grpc/mem"

// Counted is a message that is sent, with somebody who wants to know how much of
// a connection's is on its way. Only the Codec of this package can send it.
type Counted struct {
	Message any
	// Held is called once, with the length of the encoded message, or 0 where it can't
	// be encoded. What it returns is called once, when the bytes are given up: they were
	// sent, or never will be. nil: nothing.
	Held func(n int) (freed func())
}

// marshalCounted encodes c's message, with a buffer of no bytes behind it that
// tells when all are given up.
func (c *Codec) marshalCounted(m *Counted) (mem.BufferSlice, error) {
	data, err := c.Marshal(m.Message)
	if err != nil {
		m.Held(0)
		return nil, err
	}
	if freed := m.Held(data.Len()); freed != nil {
		data = append(data, newTold(freed))
	}
	return data, nil
}

// told is a pool that is told when its only buffer is given up.
type told func()

// Get implements mem.BufferPool. Nobody calls it.
func (told) Get(n int) *[]byte {
	b := make([]byte, n)
	return &b
}

// Put implements mem.BufferPool.
func (t told) Put(*[]byte) { t() }

// toldRoom is what a buffer must have room for to be given back to a pool.
const toldRoom = 1 << 10

func newTold(freed func()) mem.Buffer {
	b := make([]byte, 0, toldRoom+1)
	return mem.NewBuffer(&b, told(freed))
}
