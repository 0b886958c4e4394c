package wire

import (
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// TreeResponse is a GetTreeResponse, to be sent. Its Directories are sent as they
// are kept, and not decoded and encoded anew: to generated code, which then
// passes them on as they are, they are fields that it does not know.
type TreeResponse struct {
	repb.GetTreeResponse
	n int
}

// Len is how many Directories were added.
func (r *TreeResponse) Len() int { return r.n }

// Add adds a copy of an encoded Directory.
func (r *TreeResponse) Add(encoded []byte) {
	m := r.ProtoReflect()
	m.SetUnknown(protowire.AppendBytes(append(m.GetUnknown(), bytesField1), encoded))
	r.n++
}

func (r *TreeResponse) marshalWire(mem.BufferPool) (mem.BufferSlice, bool, error) {
	if len(r.Directories) > 0 {
		return nil, false, nil
	}
	// A page is large, and belongs to nobody else any more: it is not copied.
	slice := mem.BufferSlice{mem.SliceBuffer(r.ProtoReflect().GetUnknown())}
	if r.NextPageToken != "" {
		slice = append(slice, mem.SliceBuffer(protowire.AppendString([]byte{bytesField2}, r.NextPageToken)))
	}
	return slice, true, nil
}
