package wire

import (
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

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

// Text is the string of a field: the last one where there are several, as decoders
// take it, and "" where there is none. It is not ok where the bytes are no message.
func (r *Raw) Text(field protowire.Number) (text string, ok bool) {
	in := pieces{rest: r.data}
	for in.more() {
		tag, ok := in.varint()
		if !ok {
			return "", false
		}
		n, kind := protowire.DecodeTag(tag)
		switch {
		case n < protowire.MinValidNumber:
			return "", false
		case n == field && kind == protowire.BytesType:
			text, ok = in.text()
		default:
			ok = in.skip(kind)
		}
		if !ok {
			return "", false
		}
	}
	return text, true
}

// skip passes over the value of a field. Groups, which no message of ours has, it
// does not know.
func (p *pieces) skip(kind protowire.Type) bool {
	n := uint64(0)
	switch kind { //nolint:exhaustive // see above
	case protowire.VarintType:
		_, ok := p.varint()
		return ok
	case protowire.Fixed32Type:
		n = 4
	case protowire.Fixed64Type:
		n = 8
	case protowire.BytesType:
		var ok bool
		if n, ok = p.varint(); !ok {
			return false
		}
	default:
		return false
	}
	for n > 0 {
		if !p.more() {
			return false
		}
		here := min(uint64(p.rest[0].Len()-p.off), n) //nolint:gosec // it is not negative
		p.off += int(here)                            //nolint:gosec // at most the buffer's length
		n -= here
	}
	return true
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
