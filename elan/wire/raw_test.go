package wire

import (
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// rawOf is data as it is received, in buffers of two bytes.
func rawOf(data []byte) *Raw {
	r := &Raw{}
	for len(data) > 0 {
		n := min(2, len(data))
		r.data = append(r.data, mem.SliceBuffer(data[:n]))
		data = data[n:]
	}
	return r
}

func TestRaw_Text(t *testing.T) {
	whole, err := proto.Marshal(&repb.BatchUpdateBlobsRequest{
		InstanceName:   "team/main",
		DigestFunction: repb.DigestFunction_BLAKE3,
		Requests:       []*repb.BatchUpdateBlobsRequest_Request{{Digest: &repb.Digest{Hash: "abc", SizeBytes: 3}, Data: []byte("xyz")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	text := func(n protowire.Number, s string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, n, protowire.BytesType), s)
	}
	odd := protowire.AppendFixed32(protowire.AppendTag(nil, 7, protowire.Fixed32Type), 1)
	odd = protowire.AppendFixed64(protowire.AppendTag(odd, 8, protowire.Fixed64Type), 1)
	odd = protowire.AppendVarint(protowire.AppendTag(odd, 1, protowire.VarintType), 5) // not a string: another field, to decoders
	for name, tc := range map[string]struct {
		data []byte
		want string
		bad  bool
	}{
		"nothing":             {},
		"a whole message":     {data: whole, want: "team/main"},
		"behind other fields": {data: append(odd, text(1, "a")...), want: "a"},
		"twice":               {data: append(text(1, "mine"), text(1, "yours")...), want: "yours"},
		"cut off":             {data: whole[:5], bad: true},
		"cut off in another":  {data: whole[:len(whole)-1], bad: true},
		"not UTF-8":           {data: text(1, "\xff"), bad: true},
		"a group":             {data: protowire.AppendTag(nil, 3, protowire.StartGroupType), bad: true},
		"field 0":             {data: []byte{2, 0}, bad: true},
	} {
		t.Run(name, func(t *testing.T) {
			if got, ok := rawOf(tc.data).Text(1); got != tc.want || ok == tc.bad {
				t.Errorf("Text(1) = %q, %v; want %q, %v", got, ok, tc.want, !tc.bad)
			}
		})
	}
}

// FuzzRaw_Text: what is taken for the instance's name is what a decoder takes for
// it, or nobody could be told apart by it.
func FuzzRaw_Text(f *testing.F) {
	whole, _ := proto.Marshal(&repb.GetActionResultRequest{InstanceName: "main", ActionDigest: &repb.Digest{Hash: "x"}})
	f.Add(whole)
	f.Add(append(whole, whole...))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, ok := rawOf(data).Text(1)
		m := &repb.GetActionResultRequest{}
		if err := proto.Unmarshal(data, m); err == nil && ok && got != m.InstanceName {
			t.Errorf("Text(1) = %q, a decoder takes %q", got, m.InstanceName)
		}
	})
}
