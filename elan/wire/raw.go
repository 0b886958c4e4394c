package wire

import "google.golang.org/grpc/mem"

// Raw is a message of any type as its bytes, which stay in the buffers in which
// they were received, for one who passes it on and does not look at it. Sending
// it gives up the bytes. It needs the Codec on both sides, and is no
// proto.Message. The zero Raw is an empty message.
type Raw struct{ data mem.BufferSlice }

// Len is the number of its bytes.
func (r *Raw) Len() int { return r.data.Len() }

// Clone is the same message once more, for one that may be sent twice. Each is to
// be sent or freed.
func (r *Raw) Clone() *Raw {
	r.data.Ref()
	return &Raw{data: r.data}
}

// Free gives up the bytes. The message may be received into again.
func (r *Raw) Free() {
	r.data.Free()
	r.data = nil
}

func (r *Raw) unmarshalWire(data mem.BufferSlice, _ mem.BufferPool) bool {
	r.Free()
	data.Ref()
	r.data = data
	return true
}

func (r *Raw) marshalWire(mem.BufferPool) (mem.BufferSlice, bool, error) {
	data := r.data
	r.data = nil
	return data, true, nil
}
