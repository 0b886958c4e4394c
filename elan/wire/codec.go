// Package wire is how the hot messages of the Remote Execution API get from
// gRPC's buffers into the hands of elan/rpc and elan/client, and back, without the
// copies and the allocations that generated code makes: the bytes of a blob stay
// in the buffers in which they were received, and thousands of digests are
// parsed in one go.
//
// It knows encodings and nothing else: what a digest or a size means, and what is
// done about it, is its callers'. Each of its messages is read and written by
// hand where it is of the usual form, and by the generated code where it is not,
// so that both sides of every case mean the same; and each is a proto.Message
// too, so that it also passes through a gRPC server or client that does not have
// the Codec, only slower.
//
// What aliases a buffer is valid until Free, which the holder of a message calls
// once, when nothing uses the bytes any more. A message is used by one goroutine
// at a time, but for what its methods say.
package wire

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
)

// Codec is gRPC's codec "proto", with the messages of this package read and
// written by hand, and with buffers for all others that are not cleared before
// they are overwritten. It is safe for concurrent use.
type Codec struct{ pool mem.BufferPool }

var _ encoding.CodecV2 = (*Codec)(nil)

// NewCodec returns a Codec with buffers of pool, see NewPool.
func NewCodec(pool mem.BufferPool) *Codec { return &Codec{pool: pool} }

// marshaler is a message that is written by hand. The slice is its reader's to
// free. Where ok is false, generated code writes it.
type marshaler interface {
	marshalWire(pool mem.BufferPool) (data mem.BufferSlice, ok bool, err error)
}

// unmarshaler is a message that is read by hand. It takes references of its own
// to what it keeps of data. Where it returns false it has kept nothing, and
// generated code reads it.
type unmarshaler interface {
	unmarshalWire(data mem.BufferSlice, pool mem.BufferPool) bool
}

// Marshal implements encoding.CodecV2.
func (c *Codec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(*Counted); ok {
		return c.marshalCounted(m)
	}
	if m, ok := v.(marshaler); ok {
		if data, ok, err := m.marshalWire(c.pool); ok || err != nil {
			return data, err
		}
	}
	m, err := message(v)
	if err != nil {
		return nil, err
	}
	size := proto.Size(m)
	opts := proto.MarshalOptions{UseCachedSize: true}
	if mem.IsBelowBufferPoolingThreshold(size) {
		b, err := opts.Marshal(m)
		if err != nil {
			return nil, err //nolint:wrapcheck // gRPC says what it is
		}
		return mem.BufferSlice{mem.SliceBuffer(b)}, nil
	}
	buf := c.pool.Get(size)
	b, err := opts.MarshalAppend((*buf)[:0], m)
	if err != nil {
		c.pool.Put(buf)
		return nil, err //nolint:wrapcheck // gRPC says what it is
	}
	*buf = b
	return mem.BufferSlice{mem.NewBuffer(buf, c.pool)}, nil
}

// Unmarshal implements encoding.CodecV2.
func (c *Codec) Unmarshal(data mem.BufferSlice, v any) error {
	if m, ok := v.(unmarshaler); ok && m.unmarshalWire(data, c.pool) {
		return nil
	}
	m, err := message(v)
	if err != nil {
		return err
	}
	buf := data.MaterializeToBuffer(c.pool)
	defer buf.Free()
	return proto.Unmarshal(buf.ReadOnlyData(), m) //nolint:wrapcheck // gRPC says what it is
}

// Name implements encoding.CodecV2: on the wire it is what all speak.
func (*Codec) Name() string { return grpcproto.Name }

func message(v any) (proto.Message, error) {
	switch v := v.(type) {
	case protoadapt.MessageV2:
		return v, nil
	case protoadapt.MessageV1:
		return protoadapt.MessageV2Of(v), nil
	}
	return nil, fmt.Errorf("%T is no message", v)
}
