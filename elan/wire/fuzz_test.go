package wire_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/elan/wire"
)

// kinds are the messages that are read by hand, each beside what generated code
// makes of the same bytes.
func kinds() [][2]proto.Message {
	return [][2]proto.Message{
		{&wire.FindMissingRequest{}, &repb.FindMissingBlobsRequest{}},
		{&wire.FindMissingResponse{}, &repb.FindMissingBlobsResponse{}},
		{&wire.BatchUpdateRequest{}, &repb.BatchUpdateBlobsRequest{}},
		{&wire.BatchReadRequest{}, &repb.BatchReadBlobsRequest{}},
		{&wire.WriteRequest{}, &bytestream.WriteRequest{}},
		{&wire.ReadResponse{}, &bytestream.ReadResponse{}},
	}
}

// seeds are encodings, good and bad, of all kinds.
func seeds(t testing.TB) [][]byte {
	t.Helper()
	hash := strings.Repeat("0123456789abcdef", 4)
	d := func(n int64) *repb.Digest { return &repb.Digest{Hash: hash, SizeBytes: n} }
	var list []*repb.Digest
	for i := range int64(150) { // more than share an allocation
		list = append(list, &repb.Digest{Hash: fmt.Sprintf("%064x", i), SizeBytes: i})
	}
	var all [][]byte
	for _, m := range []proto.Message{
		&repb.FindMissingBlobsRequest{InstanceName: "é", DigestFunction: repb.DigestFunction_BLAKE3, BlobDigests: list},
		&repb.FindMissingBlobsRequest{DigestFunction: -1, BlobDigests: []*repb.Digest{{}, d(-1), {Hash: "é"}}},
		&repb.FindMissingBlobsResponse{MissingBlobDigests: list},
		&repb.BatchUpdateBlobsRequest{InstanceName: "i", DigestFunction: 1, Requests: []*repb.BatchUpdateBlobsRequest_Request{
			{Digest: d(5), Data: []byte("hello")},
			{},
			{Digest: &repb.Digest{}, Compressor: repb.Compressor_ZSTD, Data: bytes.Repeat([]byte("x"), 300)},
		}},
		&repb.BatchReadBlobsRequest{
			InstanceName: "i", DigestFunction: 1, Digests: list,
			AcceptableCompressors: []repb.Compressor_Value{0, 1, -5},
		},
		&bytestream.WriteRequest{ResourceName: "uploads/é", WriteOffset: 1 << 40, FinishWrite: true, Data: bytes.Repeat([]byte("x"), 300)},
		&bytestream.WriteRequest{WriteOffset: -1, Data: []byte("abc")},
		&bytestream.ReadResponse{Data: bytes.Repeat([]byte("y"), 200)},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	return append(
		all,
		nil,
		[]byte("\x0a\x01\xff"),                  // no UTF-8
		[]byte("\x0a\x02a"),                     // too short
		[]byte("\x52\x03abc\x52\x01d"),          // data twice
		[]byte("\x52\x03abc\x0a\x01n\x7a\x01u"), // name after data, and an unknown field
		[]byte("\x8a\x00\x01a"),                 // a tag that is longer than it need be
		[]byte("\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
		[]byte("\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"),                 // over 64 bits
		[]byte("\x18\x80\x80\x80\x80\x10"),                                     // an enum of over 32 bits
		[]byte("\x12\x08\x0a\x02\x0a\x00\x0a\x02\x10\x05"),                     // a digest in two parts
		[]byte("\x12\x04\x0a\x02\x10\x05\x12\x06\x12\x01a\x12\x01b\x12\x00"),   // data twice, and nothing
		[]byte("\x12\x06\x0a\x01a\x0a\x01b\x12\x04\x10\x01\x10\x02"),           // hash twice, size twice
		[]byte("\x0b\x0c\x12\x02\x08\x01\x12\x02\x13\x14\x12\x03\x1a\x01\x01"), // groups and wrong types
		[]byte("\x1a\x02\x80\x01\x18\x01\x1a\x01\x80"),
		[]byte("\x00"), []byte("\x52"), []byte("\x52\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
	)
}

// FuzzUnmarshal holds that what is read by hand means the same as what generated
// code reads, however the bytes are cut into buffers, after these buffers were
// overwritten, and that every reference to them is given up by Free.
func FuzzUnmarshal(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b, uint16(max(1, len(b)/100)))
		f.Add(b, uint16(7+len(b)/20))
		f.Add(b, uint16(1000))
	}
	f.Fuzz(func(t *testing.T, b []byte, cut uint16) {
		for _, kind := range kinds() {
			pool := &poisonPool{}
			codec := wire.NewCodec(pool)
			got, want := kind[0], kind[1]
			data := pool.slice(b, int(cut))
			err := codec.Unmarshal(data, got)
			data.Free()
			wantErr := proto.Unmarshal(b, want)
			if (err == nil) != (wantErr == nil) {
				t.Fatalf("%T: error %v, generated code says %v", got, err, wantErr)
			}
			if err == nil && !proto.Equal(want, generated(got)) {
				// Unknown fields are kept by generated code alone, and matter to nobody.
				if diff := cmp.Diff(want, generated(got), protocmp.Transform(), protocmp.IgnoreUnknown(), cmp.Comparer(bytes.Equal)); diff != "" {
					t.Fatalf("%T: (-generated +by hand)\n%s", got, diff)
				}
			}
			if m, ok := got.(interface{ Free() }); ok {
				m.Free()
			}
			pool.check(t)
		}
	})
}

// generated is m as a message of the generated code.
func generated(m proto.Message) proto.Message { return m.ProtoReflect().Interface() }
