package wire

import (
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// BatchReadRequest is a BatchReadBlobsRequest. Of the embedded message the
// digests are not to be used.
type BatchReadRequest struct {
	repb.BatchReadBlobsRequest
	digests []Digest
}

// BlobDigests are those of the blobs that are asked for.
func (r *BatchReadRequest) BlobDigests() []Digest {
	if r.digests == nil {
		return digestsOf(r.Digests)
	}
	return r.digests
}

// ProtoReflect implements proto.Message, for those who do not know this package.
func (r *BatchReadRequest) ProtoReflect() protoreflect.Message {
	if len(r.Digests) == 0 && len(r.digests) > 0 {
		r.Digests = protosOf(r.digests)
	}
	return r.BatchReadBlobsRequest.ProtoReflect()
}

func (r *BatchReadRequest) unmarshalWire(data mem.BufferSlice, pool mem.BufferPool) bool {
	buf := data.MaterializeToBuffer(pool)
	defer buf.Free()
	var head repb.BatchReadBlobsRequest
	ds, ok := parseDigests(buf.ReadOnlyData(), func(tag byte, b []byte) (rest []byte, ok bool) {
		switch tag {
		case bytesField1:
			head.InstanceName, rest, ok = parseText(b)
		case varintField4:
			rest, ok = parseEnum(b, &head.DigestFunction)
		case varintField3:
			var c repb.Compressor_Value
			rest, ok = parseEnum(b, &c)
			head.AcceptableCompressors = append(head.AcceptableCompressors, c)
		case bytesField3:
			head.AcceptableCompressors, rest, ok = parsePacked(head.AcceptableCompressors, b)
		}
		return rest, ok
	})
	if ok {
		r.InstanceName, r.DigestFunction, r.AcceptableCompressors, r.digests = head.InstanceName, head.DigestFunction, head.AcceptableCompressors, ds
	}
	return ok
}

// parsePacked appends a packed list of enums to list.
func parsePacked[E ~int32](list []E, b []byte) (_ []E, rest []byte, ok bool) {
	value, rest, ok := lengthDelimited(b)
	for ok && len(value) > 0 {
		var e E
		value, ok = parseEnum(value, &e)
		list = append(list, e)
	}
	return list, rest, ok
}

// BatchReadResponse is a BatchReadBlobsResponse, to be sent. The blobs are read
// into the very buffer that is sent. Its methods may be called for different
// blobs at once.
type BatchReadResponse struct {
	repb.BatchReadBlobsResponse
	items []readItem
	raw   []byte
	buf   mem.Buffer
}

// readItem is the reply about one blob: the blob's bytes from data
// on, or a Status. All offsets are into raw.
type readItem struct {
	digest     Digest
	data, end  int // where the bytes are: all of them as long as nothing else is known
	compressor repb.Compressor_Value
	status     *spb.Status
}

// room is how many bytes are set aside before those of a blob for what its reply
// has beside them: tags, lengths, the digest, a status and a compressor.
func (it *readItem) room() int {
	return 1 + protowire.SizeVarint(1<<31) + 1 + protowire.SizeBytes(sizeDigest(it.digest)) + 2 + 2 + 1 + protowire.SizeVarint(1<<31)
}

// NewBatchReadResponse has room for blobs of those digests, in a buffer of pool.
// A blob with a size below 0 has none. The caller bounds the sum of the sizes.
// Sending the message gives up its bytes.
func NewBatchReadResponse(pool mem.BufferPool, ds []Digest) *BatchReadResponse {
	r := &BatchReadResponse{items: make([]readItem, len(ds))}
	n := 0
	for i, d := range ds {
		it := &r.items[i]
		it.digest = d
		it.data = n + it.room()
		it.end = it.data + int(max(d.SizeBytes, 0))
		n = it.end
	}
	raw := pool.Get(n)
	r.raw, r.buf = *raw, mem.NewBuffer(raw, pool)
	return r
}

// Room is where the bytes of blob i are to be put: all of them.
func (r *BatchReadResponse) Room(i int) []byte {
	it := &r.items[i]
	return r.raw[it.data:it.end:it.end]
}

// SetCompressed says that blob i has been replaced, in its Room, by n bytes of
// what a compressor made of it.
func (r *BatchReadResponse) SetCompressed(i, n int, c repb.Compressor_Value) {
	it := &r.items[i]
	it.end, it.compressor = it.data+n, c
}

// SetStatus says that blob i could not be read.
func (r *BatchReadResponse) SetStatus(i int, s *spb.Status) {
	it := &r.items[i]
	it.end, it.status = it.data, s
}

// Statuses yields those of the blobs that could not be read.
func (r *BatchReadResponse) Statuses(yield func(*spb.Status) bool) {
	for i := range r.items {
		if s := r.items[i].status; s != nil && !yield(s) {
			return
		}
	}
}

// ProtoReflect implements proto.Message, for those who do not know this package.
func (r *BatchReadResponse) ProtoReflect() protoreflect.Message {
	if len(r.Responses) == 0 {
		for i := range r.items {
			r.Responses = append(r.Responses, r.proto(i))
		}
	}
	return r.BatchReadBlobsResponse.ProtoReflect()
}

// proto is the reply about blob i as generated code has it. It aliases the bytes.
func (r *BatchReadResponse) proto(i int) *repb.BatchReadBlobsResponse_Response {
	it := &r.items[i]
	p := &repb.BatchReadBlobsResponse_Response{Digest: it.digest.Proto(), Status: it.status, Data: r.Room(i), Compressor: it.compressor}
	if p.Status == nil {
		p.Status = &spb.Status{}
	}
	return p
}

func (r *BatchReadResponse) marshalWire(mem.BufferPool) (mem.BufferSlice, bool, error) {
	if r.buf == nil || len(r.Responses) > 0 {
		return nil, false, nil
	}
	data := make(mem.BufferSlice, 0, len(r.items))
	for i := range r.items {
		it := &r.items[i]
		if it.status != nil || !utf8.ValidString(it.digest.Hash) {
			b, err := r.marshalProto(i)
			if err != nil {
				data.Free()
				return nil, false, err
			}
			data = append(data, mem.SliceBuffer(b))
			continue
		}
		data = append(data, r.buf.Slice(it.writeHead(r.raw), it.end))
	}
	r.buf.Free()
	r.buf, r.raw, r.items = nil, nil, nil
	return data, true, nil
}

// writeHead writes what precedes the bytes of a blob to before them, and returns
// where it begins.
func (it *readItem) writeHead(raw []byte) int {
	n := it.end - it.data
	size := sizeDigest(it.digest)
	inner := 1 + protowire.SizeBytes(size) + 2
	if it.compressor != 0 {
		inner += 1 + protowire.SizeVarint(uint64(it.compressor)) //nolint:gosec // not negative
	}
	if n > 0 {
		inner += 1 + protowire.SizeVarint(uint64(n)) //nolint:gosec // a length
	}
	begin := it.data - inner - 1 - protowire.SizeVarint(uint64(inner+n)) //nolint:gosec // a length
	b := append(raw[begin:begin], bytesField1)
	b = protowire.AppendVarint(b, uint64(inner+n)) //nolint:gosec // a length
	b = appendDigest(b, bytesField1, it.digest, size)
	b = append(b, bytesField3, 0) // OK
	if it.compressor != 0 {
		b = protowire.AppendVarint(append(b, varintField4), uint64(it.compressor)) //nolint:gosec // not negative
	}
	if n > 0 {
		protowire.AppendVarint(append(b, bytesField2), uint64(n)) //nolint:gosec // a length
	}
	return begin
}

// marshalProto is the reply about blob i, a failure, as a field of the message.
func (r *BatchReadResponse) marshalProto(i int) ([]byte, error) {
	b, err := proto.Marshal(r.proto(i))
	if err != nil {
		return nil, err //nolint:wrapcheck // gRPC says what it is
	}
	return protowire.AppendBytes([]byte{bytesField1}, b), nil
}
