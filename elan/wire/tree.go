package wire

import (
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// TreeResponse is a GetTreeResponse, to be sent. Its Directories are sent as they
// were encoded, and not encoded anew.
type TreeResponse struct {
	repb.GetTreeResponse
	encoded [][]byte // Directories, as many and in their order
}

// Add adds a Directory and its encoding, both of which the message keeps.
func (r *TreeResponse) Add(d *repb.Directory, encoded []byte) {
	r.Directories = append(r.Directories, d)
	r.encoded = append(r.encoded, encoded)
}

func (r *TreeResponse) marshalWire(pool mem.BufferPool) (mem.BufferSlice, bool, error) {
	if len(r.encoded) != len(r.Directories) {
		return nil, false, nil
	}
	size := 1 + protowire.SizeBytes(len(r.NextPageToken))
	for _, d := range r.encoded {
		size += 1 + protowire.SizeBytes(len(d))
	}
	buf := pool.Get(size)
	b := (*buf)[:0]
	for _, d := range r.encoded {
		b = protowire.AppendBytes(append(b, bytesField1), d)
	}
	if r.NextPageToken != "" {
		b = protowire.AppendString(append(b, bytesField2), r.NextPageToken)
	}
	*buf = b
	return mem.BufferSlice{mem.NewBuffer(buf, pool)}, true, nil
}
