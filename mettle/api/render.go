package api

import (
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/operation"
)

// What the Any fields of an Operation hold. Both are put together as bytes: a
// response comes as bytes from the worker, and what an operation's metadata
// consists of, but for two fields, is the same in all of a call's messages.
const (
	metadataType = "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteOperationMetadata"
	responseType = "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteResponse"
)

// Field numbers of remote_execution.proto and google/rpc/status.proto.
const (
	metadataStage           = 1 // ExecuteOperationMetadata
	metadataActionDigest    = 2
	metadataStdoutStream    = 3
	metadataStderrStream    = 4
	metadataPartialMetadata = 5
	metadataDigestFunction  = 6
	digestHash              = 1 // Digest
	digestSize              = 2
	executedWorker          = 1 // ExecutedActionMetadata
	executedQueued          = 2
	timestampSeconds        = 1 // Timestamp
	timestampNanos          = 2
	responseStatus          = 3 // ExecuteResponse
	statusCode              = 1 // Status
)

// constantMetadata is what the ExecuteOperationMetadata of all messages about n
// have in common: the action's digest, and when it was queued. Fields of a
// message that come twice are merged, so that what a worker reports adds to it.
func constantMetadata(n operation.Name) []byte {
	b := make([]byte, 0, 192)
	d := n.Action
	size := protowire.SizeTag(digestHash) + protowire.SizeBytes(len(d.Hash()))
	if d.Size() > 0 {
		size += protowire.SizeTag(digestSize) + protowire.SizeVarint(uint64(d.Size())) //nolint:gosec // it is not negative
	}
	b = protowire.AppendTag(b, metadataActionDigest, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size)) //nolint:gosec // a small number
	b = protowire.AppendTag(b, digestHash, protowire.BytesType)
	b = protowire.AppendString(b, d.Hash())
	if d.Size() > 0 {
		b = appendInt(b, digestSize, d.Size())
	}
	b = appendInt(b, metadataDigestFunction, int64(d.Function().Proto()))

	var queued [32]byte
	ts := appendInt(queued[:0], timestampSeconds, n.Created.Unix())
	if nanos := n.Created.Nanosecond(); nanos != 0 {
		ts = appendInt(ts, timestampNanos, int64(nanos))
	}
	b = protowire.AppendTag(b, metadataPartialMetadata, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(protowire.SizeTag(executedQueued)+protowire.SizeBytes(len(ts)))) //nolint:gosec // a small number
	b = protowire.AppendTag(b, executedQueued, protowire.BytesType)
	return protowire.AppendBytes(b, ts)
}

func appendInt(b []byte, field protowire.Number, v int64) []byte {
	b = protowire.AppendTag(b, field, protowire.VarintType)
	return protowire.AppendVarint(b, uint64(v)) //nolint:gosec // as int64 and int32 are encoded
}

func appendText(b []byte, field protowire.Number, v string) []byte {
	if v == "" {
		return b
	}
	b = protowire.AppendTag(b, field, protowire.BytesType)
	return protowire.AppendString(b, v)
}

// metadataOf is the marshalled ExecuteOperationMetadata of a state.
func (c *call) metadataOf(snap *operation.Snapshot) []byte {
	b := make([]byte, 0, len(c.metadata)+len(snap.Metadata)+len(snap.Worker)+len(snap.StdoutStream)+len(snap.StderrStream)+24)
	b = appendInt(b, metadataStage, int64(snap.Stage))
	b = append(b, c.metadata...)
	b = appendText(b, metadataStdoutStream, snap.StdoutStream)
	b = appendText(b, metadataStderrStream, snap.StderrStream)
	switch {
	case len(snap.Metadata) > 0:
		b = protowire.AppendTag(b, metadataPartialMetadata, protowire.BytesType)
		b = protowire.AppendBytes(b, snap.Metadata)
	case snap.Worker != "":
		b = protowire.AppendTag(b, metadataPartialMetadata, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(protowire.SizeTag(executedWorker)+protowire.SizeBytes(len(snap.Worker)))) //nolint:gosec // a small number
		b = protowire.AppendTag(b, executedWorker, protowire.BytesType)
		b = protowire.AppendString(b, snap.Worker)
	}
	return b
}

// cachedResponse is the marshalled ExecuteResponse of a cached result.
func cachedResponse(res *repb.ActionResult) ([]byte, error) {
	data, err := proto.Marshal(&repb.ExecuteResponse{Result: res, CachedResult: true, Status: &spb.Status{}})
	if err != nil {
		return nil, fmt.Errorf("marshal the cached result: %w", err)
	}
	return data, nil
}

// failure is the marshalled ExecuteResponse of an action that could not be queued.
func failure(err error) []byte {
	data, err := proto.Marshal(&repb.ExecuteResponse{Status: statusProto(err)})
	if err != nil { // the status is of our own making, and UTF-8
		return nil
	}
	return data
}

// codeOf reads the code of the status of a marshalled ExecuteResponse, without
// the rest, which may be large. Bytes that are none have code 0.
func codeOf(response []byte) uint64 {
	var code uint64
	eachField(response, func(field protowire.Number, typ protowire.Type, value []byte) {
		if field != responseStatus || typ != protowire.BytesType {
			return
		}
		status, n := protowire.ConsumeBytes(value)
		if n < 0 {
			return
		}
		eachField(status, func(field protowire.Number, typ protowire.Type, value []byte) {
			if v, n := protowire.ConsumeVarint(value); field == statusCode && typ == protowire.VarintType && n > 0 {
				code = v
			}
		})
	})
	return code
}

// eachField calls f with each field of a message and the bytes from its value on.
func eachField(b []byte, f func(protowire.Number, protowire.Type, []byte)) {
	for len(b) > 0 {
		field, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return
		}
		b = b[n:]
		if n = protowire.ConsumeFieldValue(field, typ, b); n < 0 {
			return
		}
		f(field, typ, b[:n])
		b = b[n:]
	}
}
