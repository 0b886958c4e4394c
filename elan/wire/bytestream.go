package wire

import (
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// WriteRequest is a bytestream.WriteRequest whose bytes stay where they were
// received, mostly in pieces of 16 KiB. Data of the embedded message is not to
// be used.
type WriteRequest struct {
	bytestream.WriteRequest
	data mem.BufferSlice
}

// Len is the number of the bytes of the blob in r.
func (r *WriteRequest) Len() int { return r.data.Len() + len(r.Data) }

// Pieces are the bytes of the blob, piece by piece. They are valid until Free.
func (r *WriteRequest) Pieces() mem.BufferSlice {
	if len(r.Data) > 0 {
		return mem.BufferSlice{mem.SliceBuffer(r.Data)}
	}
	return r.data
}

// Take hands over the bytes of the blob to the caller, who frees them.
func (r *WriteRequest) Take() mem.BufferSlice {
	data := r.Pieces()
	r.data, r.Data = nil, nil
	return data
}

// Bytes are the bytes of the blob in one piece, which are valid until Free. It
// copies them to a buffer of pool where there are several.
func (r *WriteRequest) Bytes(pool mem.BufferPool) []byte {
	if len(r.data) == 0 {
		return r.Data
	}
	if len(r.data) > 1 {
		one := r.data.MaterializeToBuffer(pool)
		r.data.Free()
		r.data = mem.BufferSlice{one}
	}
	return r.data[0].ReadOnlyData()
}

// Free gives up the bytes of the blob. The message may be received into again.
func (r *WriteRequest) Free() {
	r.data.Free()
	r.data, r.Data = nil, nil
}

// ProtoReflect implements proto.Message, for those who do not know this package.
func (r *WriteRequest) ProtoReflect() protoreflect.Message {
	if len(r.Data) == 0 && len(r.data) > 0 {
		r.Data = r.data.Materialize()
		r.data.Free()
		r.data = nil
	}
	return r.WriteRequest.ProtoReflect()
}

func (r *WriteRequest) unmarshalWire(data mem.BufferSlice, _ mem.BufferPool) bool {
	r.Free()
	r.Reset()
	in := pieces{rest: data}
	for in.more() {
		ok := false
		switch in.next() {
		case bytesField1:
			r.ResourceName, ok = in.text()
		case varintField2:
			var v uint64
			v, ok = in.varint()
			r.WriteOffset = int64(v) //nolint:gosec // the encoding of negative numbers
		case varintField3:
			var v uint64
			v, ok = in.varint()
			r.FinishWrite = v != 0
		case bytesField10:
			r.data.Free()
			r.data, ok = in.bytes()
		}
		if !ok {
			r.Free()
			r.Reset()
			return false
		}
	}
	return true
}

// ReadResponse is a bytestream.ReadResponse. One that is sent has room for the
// encoding around the bytes, which are sent from where they are; one that is
// received leaves them in the buffers in which they came.
type ReadResponse struct {
	bytestream.ReadResponse
	room []byte     // of one that is sent: the buffer
	buf  mem.Buffer // and its owner
	n    int        // bytes of the blob in room, after readHead
	data mem.BufferSlice
}

// readHead is room for the tag and the length before the bytes.
const readHead = 1 + 5

// NewReadResponse is a message to be sent, with room for n bytes of pool. Sending
// it gives up its bytes.
func NewReadResponse(pool mem.BufferPool, n int) *ReadResponse {
	raw := pool.Get(readHead + n)
	return &ReadResponse{room: *raw, buf: mem.NewBuffer(raw, pool)}
}

// Room is where the bytes of the blob are to be put, before SetLen tells how many
// there are.
func (r *ReadResponse) Room() []byte { return r.room[readHead:] }

// SetLen makes the first n bytes of Room those that are sent. It is called before
// the message is.
func (r *ReadResponse) SetLen(n int) { r.n = n }

// Pieces are the bytes that were received. They are valid until Free.
func (r *ReadResponse) Pieces() mem.BufferSlice {
	if len(r.Data) > 0 {
		return mem.BufferSlice{mem.SliceBuffer(r.Data)}
	}
	return r.data
}

// Free gives up the bytes. The message may be received into again.
func (r *ReadResponse) Free() {
	if r.buf != nil {
		r.buf.Free()
	}
	r.data.Free()
	r.buf, r.room, r.data, r.Data, r.n = nil, nil, nil, nil, 0
}

// ProtoReflect implements proto.Message, for those who do not know this package.
func (r *ReadResponse) ProtoReflect() protoreflect.Message {
	switch {
	case r.n > 0:
		r.Data = r.room[readHead : readHead+r.n]
	case len(r.data) > 0 && len(r.Data) == 0:
		r.Data = r.data.Materialize()
		r.data.Free()
		r.data = nil
	}
	return r.ReadResponse.ProtoReflect()
}

func (r *ReadResponse) marshalWire(mem.BufferPool) (mem.BufferSlice, bool, error) {
	if r.buf == nil {
		return nil, false, nil
	}
	defer r.Free()
	if r.n == 0 {
		return nil, true, nil
	}
	head := 1 + protowire.SizeVarint(uint64(r.n)) //nolint:gosec // a length
	begin := readHead - head
	protowire.AppendVarint(append(r.room[begin:begin], bytesField10), uint64(r.n)) //nolint:gosec // a length
	return mem.BufferSlice{r.buf.Slice(begin, readHead+r.n)}, true, nil
}

func (r *ReadResponse) unmarshalWire(data mem.BufferSlice, _ mem.BufferPool) bool {
	r.Free()
	in := pieces{rest: data}
	for in.more() {
		ok := false
		if in.next() == bytesField10 {
			r.data.Free()
			r.data, ok = in.bytes()
		}
		if !ok {
			r.Free()
			return false
		}
	}
	return true
}

// pieces reads an encoding that is in several buffers.
type pieces struct {
	rest mem.BufferSlice
	off  int // what is read of the first of them
}

// more reports whether there is a byte more, and goes to the buffer that has it.
func (p *pieces) more() bool {
	for len(p.rest) > 0 {
		if p.off < p.rest[0].Len() {
			return true
		}
		p.rest, p.off = p.rest[1:], 0
	}
	return false
}

// next is the byte that more has found.
func (p *pieces) next() byte {
	b := p.rest[0].ReadOnlyData()[p.off]
	p.off++
	return b
}

func (p *pieces) varint() (v uint64, ok bool) {
	for shift := uint(0); shift < 64; shift += 7 {
		if !p.more() {
			return 0, false
		}
		b := p.next()
		if shift == 63 && b > 1 {
			return 0, false
		}
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return v, true
		}
	}
	return 0, false
}

// bytes is a length and so many bytes, as references to the buffers that have
// them, which the caller frees.
func (p *pieces) bytes() (data mem.BufferSlice, ok bool) {
	n, ok := p.varint()
	if !ok {
		return nil, false
	}
	for n > 0 {
		if !p.more() {
			data.Free()
			return nil, false
		}
		here := min(uint64(p.rest[0].Len()-p.off), n) //nolint:gosec // it is not negative
		end := p.off + int(here)                      //nolint:gosec // at most the buffer's length
		data = append(data, p.rest[0].Slice(p.off, end))
		p.off = end
		n -= here
	}
	return data, true
}

func (p *pieces) text() (string, bool) {
	data, ok := p.bytes()
	if !ok {
		return "", false
	}
	defer data.Free()
	b := data.Materialize()
	return string(b), utf8.Valid(b)
}
