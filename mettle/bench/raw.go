package bench

import (
	"context"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/mettle-build/mettle/elan/digest"
)

// The load generator shares the machine with the server that it measures. So the
// messages that are large or have thousands of parts are encoded once, or from
// pieces that are, and their answers are counted where they were received; the
// generated code would take as much of the machine as a good server does.

// rawMessage is an encoded message, in pieces that nobody changes any more.
type rawMessage [][]byte

// rawAnswer takes an encoded message, of which it keeps nothing.
type rawAnswer interface {
	take(data mem.BufferSlice) error
}

// rawCodec is gRPC's own codec for all but raw messages.
type rawCodec struct{ encoding.CodecV2 }

func newRawCodec() rawCodec { return rawCodec{encoding.GetCodecV2(grpcproto.Name)} }

// Marshal implements encoding.CodecV2.
func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(rawMessage)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	data := make(mem.BufferSlice, len(m))
	for i, p := range m {
		data[i] = mem.SliceBuffer(p)
	}
	return data, nil
}

// Unmarshal implements encoding.CodecV2.
func (c rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if a, ok := v.(rawAnswer); ok {
		return a.take(data)
	}
	return c.CodecV2.Unmarshal(data, v)
}

// invoke is a call with one message each way.
func (c *client) invoke(ctx context.Context, method string, req rawMessage, a rawAnswer) error {
	return c.conn.Invoke(ctx, method, req, a, grpc.ForceCodecV2(c.raw))
}

// open is a call with more messages.
func (c *client) open(ctx context.Context, method string) (grpc.ClientStream, error) {
	return c.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method, grpc.ForceCodecV2(c.raw))
}

// eachField calls f with the number and the value of each field of a message
// that has a length.
func eachField(b []byte, f func(num protowire.Number, value []byte) error) error {
	return everyField(b, func(num protowire.Number, value []byte, _ uint64) error {
		if value == nil {
			return nil
		}
		return f(num, value)
	})
}

// everyField calls f with the number of each field of a message, and with its
// value: one that has a length, which is never nil, or one that is a varint. The
// others are passed over.
func everyField(b []byte, f func(num protowire.Number, value []byte, varint uint64) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		var value []byte
		var varint uint64
		switch typ {
		case protowire.BytesType:
			if value, n = protowire.ConsumeBytes(b); value == nil {
				value = []byte{}
			}
		case protowire.VarintType:
			varint, n = protowire.ConsumeVarint(b)
		default:
			if n = protowire.ConsumeFieldValue(num, typ, b); n >= 0 {
				b = b[n:]
				continue
			}
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if err := f(num, value, varint); err != nil {
			return err
		}
	}
	return nil
}

// fieldCounter counts the fields of one number, of one message or several.
type fieldCounter struct {
	field protowire.Number
	n     int
}

func (c *fieldCounter) take(data mem.BufferSlice) error {
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	return eachField(buf.ReadOnlyData(), func(num protowire.Number, _ []byte) error {
		if num == c.field {
			c.n++
		}
		return nil
	})
}

// batchCounter counts the blobs of a BatchReadBlobsResponse, and their bytes.
type batchCounter struct {
	blobs int
	bytes int64
}

func (c *batchCounter) take(data mem.BufferSlice) error {
	const response, blobData, status = 1, 2, 3
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	return eachField(buf.ReadOnlyData(), func(num protowire.Number, value []byte) error {
		if num != response {
			return nil
		}
		c.blobs++
		return eachField(value, func(num protowire.Number, value []byte) error {
			switch {
			case num == blobData:
				c.bytes += int64(len(value))
			case num == status && len(value) > 0:
				return answerError("BatchReadBlobs: a blob has status %x", value)
			}
			return nil
		})
	})
}

// batchStatuses counts the replies of a BatchUpdateBlobsResponse.
type batchStatuses struct{ n int }

func (c *batchStatuses) take(data mem.BufferSlice) error {
	const response, status = 1, 2
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	return eachField(buf.ReadOnlyData(), func(num protowire.Number, value []byte) error {
		if num != response {
			return nil
		}
		c.n++
		return eachField(value, func(num protowire.Number, value []byte) error {
			if num == status && len(value) > 0 {
				return answerError("BatchUpdateBlobs: a blob has status %x", value)
			}
			return nil
		})
	})
}

// dataCounter counts the bytes of blobs in ReadResponses.
type dataCounter struct{ n int64 }

func (c *dataCounter) take(data mem.BufferSlice) error {
	if len(data) == 0 {
		return nil
	}
	// One field with a length is all there is; it ends with the message.
	const dataField = 10
	num, typ, k := protowire.ConsumeTag(data[0].ReadOnlyData())
	if k > 0 && num == dataField && typ == protowire.BytesType {
		n, m := protowire.ConsumeVarint(data[0].ReadOnlyData()[k:])
		if total := data.Len(); m > 0 && n == uint64(total-k-m) { //nolint:gosec // not negative
			c.n += int64(total - k - m)
			return nil
		}
	}
	m := &bspb.ReadResponse{}
	if err := newRawCodec().Unmarshal(data, m); err != nil {
		return err
	}
	c.n += int64(len(m.GetData()))
	return nil
}

// writeMessage is a WriteRequest of m's fields and of data, whose bytes it keeps.
func writeMessage(m *bspb.WriteRequest, data []byte) rawMessage {
	var b []byte
	if m.ResourceName != "" {
		b = protowire.AppendString(protowire.AppendTag(b, 1, protowire.BytesType), m.ResourceName)
	}
	if m.WriteOffset != 0 {
		b = protowire.AppendVarint(protowire.AppendTag(b, 2, protowire.VarintType), uint64(m.WriteOffset)) //nolint:gosec // not negative
	}
	if m.FinishWrite {
		b = protowire.AppendVarint(protowire.AppendTag(b, 3, protowire.VarintType), 1)
	}
	b = protowire.AppendVarint(protowire.AppendTag(b, 10, protowire.BytesType), uint64(len(data)))
	return rawMessage{b, data}
}

// batchMessage is a BatchUpdateBlobsRequest of n blobs of s from first on.
func (c *client) batchMessage(s *series, first uint64, n int) rawMessage {
	m := make(rawMessage, 0, 3*n+1)
	heads := make([]byte, 0, 128*n) // of all blobs; what is appended does not move
	cut := func() {
		m = append(m, heads)
		heads = heads[len(heads):]
	}
	if c.instance != "" {
		heads = protowire.AppendString(protowire.AppendTag(heads, 1, protowire.BytesType), c.instance)
	}
	heads = protowire.AppendVarint(protowire.AppendTag(heads, 5, protowire.VarintType), uint64(c.fn.Proto())) //nolint:gosec // not negative
	for i := range uint64(n) {                                                                                //nolint:gosec // not negative
		d, tail := s.blob(first + i)
		name := appendDigest(nil, d)
		size := len(s.shared) + len(tail)
		inner := len(name) + 1 + protowire.SizeBytes(size)
		heads = protowire.AppendVarint(protowire.AppendTag(heads, 2, protowire.BytesType), uint64(inner)) //nolint:gosec // a length
		heads = append(heads, name...)
		heads = protowire.AppendVarint(protowire.AppendTag(heads, 2, protowire.BytesType), uint64(size)) //nolint:gosec // a length
		cut()
		m = append(m, s.shared, tail)
	}
	return m
}

// appendDigest appends d as field 1.
func appendDigest(b []byte, d digest.Digest) []byte {
	var m []byte
	m = protowire.AppendString(protowire.AppendTag(m, 1, protowire.BytesType), d.Hash())
	m = protowire.AppendVarint(protowire.AppendTag(m, 2, protowire.VarintType), uint64(d.Size())) //nolint:gosec // not negative
	return protowire.AppendBytes(protowire.AppendTag(b, 1, protowire.BytesType), m)
}

// encoded is m as a rawMessage.
func (c *client) encoded(m any) (rawMessage, error) {
	data, err := c.raw.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	return rawMessage{data.Materialize()}, nil
}

// The calls that are made so.
const (
	findMissing = repb.ContentAddressableStorage_FindMissingBlobs_FullMethodName
	batchUpdate = repb.ContentAddressableStorage_BatchUpdateBlobs_FullMethodName
	batchRead   = repb.ContentAddressableStorage_BatchReadBlobs_FullMethodName
	getTree     = repb.ContentAddressableStorage_GetTree_FullMethodName
	execute     = repb.Execution_Execute_FullMethodName
	streamRead  = "/google.bytestream.ByteStream/Read"
	streamWrite = "/google.bytestream.ByteStream/Write"
)
