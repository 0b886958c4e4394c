package wire

import (
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// FindMissingRequest is a FindMissingBlobsRequest. Of the embedded message only
// the instance name and the digest function are to be used.
type FindMissingRequest struct {
	repb.FindMissingBlobsRequest
	digests []Digest
}

// NewFindMissingRequest is a request about ds, which it keeps.
func NewFindMissingRequest(instance string, fn repb.DigestFunction_Value, ds []Digest) *FindMissingRequest {
	r := &FindMissingRequest{digests: ds}
	r.InstanceName, r.DigestFunction = instance, fn
	return r
}

// Digests are those that the request asks for.
func (r *FindMissingRequest) Digests() []Digest {
	if r.digests == nil {
		return digestsOf(r.BlobDigests)
	}
	return r.digests
}

// ProtoReflect implements proto.Message, for those who do not know this package.
func (r *FindMissingRequest) ProtoReflect() protoreflect.Message {
	if len(r.BlobDigests) == 0 && len(r.digests) > 0 {
		r.BlobDigests = protosOf(r.digests)
	}
	return r.FindMissingBlobsRequest.ProtoReflect()
}

func (r *FindMissingRequest) unmarshalWire(data mem.BufferSlice, pool mem.BufferPool) bool {
	buf := data.MaterializeToBuffer(pool)
	defer buf.Free()
	var instance string
	var fn repb.DigestFunction_Value
	ds, ok := parseDigests(buf.ReadOnlyData(), func(tag byte, b []byte) (rest []byte, ok bool) {
		switch tag {
		case bytesField1:
			instance, rest, ok = parseText(b)
		case varintField3:
			rest, ok = parseEnum(b, &fn)
		}
		return rest, ok
	})
	if ok {
		r.InstanceName, r.DigestFunction, r.digests = instance, fn, ds
	}
	return ok
}

func (r *FindMissingRequest) marshalWire(pool mem.BufferPool) (mem.BufferSlice, bool, error) {
	if !utf8.ValidString(r.InstanceName) || !validText(r.digests) || len(r.BlobDigests) > 0 {
		return nil, false, nil
	}
	size := sizeDigests(r.digests) + 2*(1+protowire.SizeVarint(1<<63)) + protowire.SizeBytes(len(r.InstanceName))
	buf := pool.Get(size)
	b := (*buf)[:0]
	if r.InstanceName != "" {
		b = protowire.AppendString(append(b, bytesField1), r.InstanceName)
	}
	b = appendDigests(b, bytesField2, r.digests)
	if r.DigestFunction != 0 {
		b = protowire.AppendVarint(append(b, varintField3), uint64(r.DigestFunction)) //nolint:gosec // the encoding of negative numbers
	}
	*buf = b
	return mem.BufferSlice{mem.NewBuffer(buf, pool)}, true, nil
}

// FindMissingResponse is a FindMissingBlobsResponse.
type FindMissingResponse struct {
	repb.FindMissingBlobsResponse
	missing []Digest
}

// NewFindMissingResponse is a response that names ds, which it keeps.
func NewFindMissingResponse(ds []Digest) *FindMissingResponse {
	return &FindMissingResponse{missing: ds}
}

// Missing are the digests that the response names.
func (r *FindMissingResponse) Missing() []Digest {
	if r.missing == nil {
		return digestsOf(r.MissingBlobDigests)
	}
	return r.missing
}

// ProtoReflect implements proto.Message, for those who do not know this package.
func (r *FindMissingResponse) ProtoReflect() protoreflect.Message {
	if len(r.MissingBlobDigests) == 0 && len(r.missing) > 0 {
		r.MissingBlobDigests = protosOf(r.missing)
	}
	return r.FindMissingBlobsResponse.ProtoReflect()
}

func (r *FindMissingResponse) unmarshalWire(data mem.BufferSlice, pool mem.BufferPool) bool {
	buf := data.MaterializeToBuffer(pool)
	defer buf.Free()
	ds, ok := parseDigests(buf.ReadOnlyData(), func(byte, []byte) ([]byte, bool) { return nil, false })
	if ok {
		r.missing = ds
	}
	return ok
}

func (r *FindMissingResponse) marshalWire(pool mem.BufferPool) (mem.BufferSlice, bool, error) {
	if !validText(r.missing) || len(r.MissingBlobDigests) > 0 {
		return nil, false, nil
	}
	buf := pool.Get(sizeDigests(r.missing))
	*buf = appendDigests((*buf)[:0], bytesField2, r.missing)
	return mem.BufferSlice{mem.NewBuffer(buf, pool)}, true, nil
}
