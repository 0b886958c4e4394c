package wire

import (
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// BatchUpdateRequest is a BatchUpdateBlobsRequest. Of the embedded message only
// the instance name and the digest function are to be used.
type BatchUpdateRequest struct {
	repb.BatchUpdateBlobsRequest
	blobs []BatchedBlob
	buf   mem.Buffer // that has the blobs' bytes
}

// BatchedBlob is one blob of a BatchUpdateRequest.
type BatchedBlob struct {
	Digest     Digest
	HasDigest  bool
	Compressor repb.Compressor_Value
	Data       []byte // valid until Free of the request
}

// Blobs are the blobs of the request.
func (r *BatchUpdateRequest) Blobs() []BatchedBlob {
	if r.blobs == nil && len(r.Requests) > 0 {
		r.blobs = make([]BatchedBlob, len(r.Requests))
		for i, b := range r.Requests {
			r.blobs[i] = BatchedBlob{
				Digest:    Digest{Hash: b.GetDigest().GetHash(), SizeBytes: b.GetDigest().GetSizeBytes()},
				HasDigest: b.GetDigest() != nil, Compressor: b.GetCompressor(), Data: b.GetData(),
			}
		}
	}
	return r.blobs
}

// Free gives up the bytes of the blobs.
func (r *BatchUpdateRequest) Free() {
	if r.buf != nil {
		r.buf.Free()
	}
	r.buf, r.blobs, r.Requests = nil, nil, nil
}

// ProtoReflect implements proto.Message, for those who do not know this package.
func (r *BatchUpdateRequest) ProtoReflect() protoreflect.Message {
	if len(r.Requests) == 0 {
		for _, b := range r.blobs {
			// A copy, because nobody tells Free when this is done with.
			q := &repb.BatchUpdateBlobsRequest_Request{Data: append([]byte(nil), b.Data...), Compressor: b.Compressor}
			if b.HasDigest {
				q.Digest = b.Digest.Proto()
			}
			r.Requests = append(r.Requests, q)
		}
	}
	return r.BatchUpdateBlobsRequest.ProtoReflect()
}

func (r *BatchUpdateRequest) unmarshalWire(data mem.BufferSlice, pool mem.BufferPool) bool {
	r.Free()
	buf := data.MaterializeToBuffer(pool)
	if !r.parse(buf.ReadOnlyData()) {
		buf.Free()
		r.Reset()
		return false
	}
	r.buf = buf
	return true
}

func (r *BatchUpdateRequest) parse(b []byte) (ok bool) {
	var blobs []BatchedBlob
	var digests digestList
	for len(b) > 0 {
		tag := b[0]
		b = b[1:]
		switch tag {
		case bytesField1:
			r.InstanceName, b, ok = parseText(b)
		case varintField5:
			b, ok = parseEnum(b, &r.DigestFunction)
		case bytesField2:
			var value []byte
			if value, b, ok = lengthDelimited(b); ok {
				var blob BatchedBlob
				var d rawDigest
				d, ok = blob.parse(value)
				digests.add(d)
				blobs = append(blobs, blob)
			}
		default:
			return false
		}
		if !ok {
			return false
		}
	}
	digests.flush()
	for i, d := range digests.list {
		blobs[i].Digest = d
	}
	r.blobs = blobs
	return true
}

// parse reads one Request, but leaves its digest to the caller.
func (b *BatchedBlob) parse(in []byte) (d rawDigest, ok bool) {
	for len(in) > 0 {
		tag := in[0]
		in = in[1:]
		switch {
		case tag == bytesField1 && !b.HasDigest: // two would have to be merged
			var value []byte
			if value, in, ok = lengthDelimited(in); ok {
				d, ok = parseDigest(value)
			}
			b.HasDigest = true
		case tag == bytesField2:
			b.Data, in, ok = lengthDelimited(in)
		case tag == varintField3:
			in, ok = parseEnum(in, &b.Compressor)
		default:
			return d, false
		}
		if !ok {
			return d, false
		}
	}
	return d, true
}

// BatchUpdateResponse is a BatchUpdateBlobsResponse, to be sent.
type BatchUpdateResponse struct {
	repb.BatchUpdateBlobsResponse
	Results []BatchResult
}

// BatchResult is what became of one blob.
type BatchResult struct {
	Digest    Digest
	HasDigest bool
	Status    *spb.Status // nil: OK
}

// ProtoReflect implements proto.Message, for those who do not know this package.
func (r *BatchUpdateResponse) ProtoReflect() protoreflect.Message {
	if len(r.Responses) == 0 {
		for _, b := range r.Results {
			p := &repb.BatchUpdateBlobsResponse_Response{Status: b.Status}
			if p.Status == nil {
				p.Status = &spb.Status{}
			}
			if b.HasDigest {
				p.Digest = b.Digest.Proto()
			}
			r.Responses = append(r.Responses, p)
		}
	}
	return r.BatchUpdateBlobsResponse.ProtoReflect()
}

func (r *BatchUpdateResponse) marshalWire(pool mem.BufferPool) (mem.BufferSlice, bool, error) {
	size := 0
	for _, b := range r.Results {
		if b.Status != nil {
			return nil, false, nil // failures are rare
		}
		size += 1 + protowire.SizeBytes(b.sizeOK())
	}
	buf := pool.Get(size)
	out := (*buf)[:0]
	for _, b := range r.Results {
		out = protowire.AppendVarint(append(out, bytesField1), uint64(b.sizeOK())) //nolint:gosec // a length
		if b.HasDigest {
			out = appendDigest(out, bytesField1, b.Digest, sizeDigest(b.Digest))
		}
		out = append(out, bytesField2, 0)
	}
	*buf = out
	return mem.BufferSlice{mem.NewBuffer(buf, pool)}, true, nil
}

// sizeOK is the length of the encoding of a success.
func (b *BatchResult) sizeOK() int {
	n := 2 // an empty Status
	if b.HasDigest {
		n += 1 + protowire.SizeBytes(sizeDigest(b.Digest))
	}
	return n
}
