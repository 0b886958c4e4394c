package wire_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/bytestream"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/elan/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sent are messages as they are sent, each made anew, and what they are to say.
func sent(pool mem.BufferPool) map[string]func() (m, want proto.Message) {
	hash := strings.Repeat("0123456789abcdef", 4)
	ds := []wire.Digest{{Hash: hash, SizeBytes: 5}, {}, {Hash: "x", SizeBytes: -1}, {Hash: hash, SizeBytes: 1 << 40}}
	protos := make([]*repb.Digest, len(ds))
	for i, d := range ds {
		protos[i] = d.Proto()
	}
	bad := &spb.Status{Code: 5, Message: "not found"}
	return map[string]func() (m, want proto.Message){
		"find": func() (m, want proto.Message) {
			return wire.NewFindMissingRequest("é", 9, ds), &repb.FindMissingBlobsRequest{InstanceName: "é", DigestFunction: 9, BlobDigests: protos}
		},
		"find, no such enum": func() (m, want proto.Message) {
			return wire.NewFindMissingRequest("", -1, nil), &repb.FindMissingBlobsRequest{DigestFunction: -1}
		},
		"found": func() (m, want proto.Message) {
			return wire.NewFindMissingResponse(ds), &repb.FindMissingBlobsResponse{MissingBlobDigests: protos}
		},
		"nothing found": func() (m, want proto.Message) {
			return wire.NewFindMissingResponse(nil), &repb.FindMissingBlobsResponse{}
		},
		"updated": func() (m, want proto.Message) {
			return &wire.BatchUpdateResponse{Results: []wire.BatchResult{{Digest: ds[0], HasDigest: true}, {}, {HasDigest: true}}},
				&repb.BatchUpdateBlobsResponse{Responses: []*repb.BatchUpdateBlobsResponse_Response{
					{Digest: protos[0], Status: &spb.Status{}}, {Status: &spb.Status{}}, {Digest: &repb.Digest{}, Status: &spb.Status{}},
				}}
		},
		"not updated": func() (m, want proto.Message) {
			return &wire.BatchUpdateResponse{Results: []wire.BatchResult{{Digest: ds[0], HasDigest: true}, {Status: bad}}},
				&repb.BatchUpdateBlobsResponse{Responses: []*repb.BatchUpdateBlobsResponse_Response{
					{Digest: protos[0], Status: &spb.Status{}}, {Status: bad},
				}}
		},
		"read": func() (m, want proto.Message) { return batch(pool, bad) },
		"chunk": func() (m, want proto.Message) {
			r := wire.NewReadResponse(pool, 1<<20)
			n := copy(r.Room(), bytes.Repeat([]byte("chunk"), 200_000))
			r.SetLen(n)
			return r, &bytestream.ReadResponse{Data: bytes.Repeat([]byte("chunk"), 200_000)}
		},
		"short chunk": func() (m, want proto.Message) {
			r := wire.NewReadResponse(pool, 1000)
			r.SetLen(copy(r.Room(), "hello"))
			return r, &bytestream.ReadResponse{Data: []byte("hello")}
		},
		"empty chunk": func() (m, want proto.Message) { return wire.NewReadResponse(pool, 10), &bytestream.ReadResponse{} },
		"tree": func() (m, want proto.Message) {
			r, w := &wire.TreeResponse{}, &repb.GetTreeResponse{NextPageToken: "next"}
			r.NextPageToken = w.NextPageToken
			for i := range 1000 {
				d := &repb.Directory{Files: []*repb.FileNode{{Name: fmt.Sprint(i), Digest: protos[0]}}}
				if i == 5 {
					d = &repb.Directory{}
				}
				b, err := proto.Marshal(d)
				if err != nil {
					panic(err)
				}
				w.Directories = append(w.Directories, d)
				r.Add(b)
			}
			return r, w
		},
		"no tree": func() (m, want proto.Message) { return &wire.TreeResponse{}, &repb.GetTreeResponse{} },
		"another's": func() (m, want proto.Message) {
			return &bytestream.ReadRequest{ResourceName: "x"}, &bytestream.ReadRequest{ResourceName: "x"}
		},
		"another's, large": func() (m, want proto.Message) {
			w := &bytestream.WriteRequest{Data: make([]byte, 100_000)}
			return w, w
		},
	}
}

// batch is a reply with blobs of all sorts.
func batch(pool mem.BufferPool, bad *spb.Status) (m, want proto.Message) {
	w := &repb.BatchReadBlobsResponse{}
	var ds []wire.Digest
	for _, n := range []int64{0, 1, 100, 127, 128, 5000, 16384, 70_000, -1, 300, 3, 900} {
		ds = append(ds, wire.Digest{Hash: strings.Repeat("a", 64), SizeBytes: n})
	}
	r := wire.NewBatchReadResponse(pool, ds)
	for i, d := range ds {
		p := &repb.BatchReadBlobsResponse_Response{Digest: d.Proto(), Status: &spb.Status{}}
		switch i {
		case 8, 10:
			r.SetStatus(i, bad)
			p.Status = bad
		case 11:
			r.SetCompressed(i, copy(r.Room(i), "frame"), repb.Compressor_ZSTD)
			p.Data, p.Compressor = []byte("frame"), repb.Compressor_ZSTD
		default:
			p.Data = bytes.Repeat([]byte{byte(i)}, int(d.SizeBytes))
			copy(r.Room(i), p.Data)
		}
		w.Responses = append(w.Responses, p)
	}
	return r, w
}

// TestMarshal holds that what is written by hand is what generated code would
// have written, by our codec and by gRPC's own.
func TestMarshal(t *testing.T) {
	pool := &poisonPool{}
	for name, make := range sent(pool) {
		t.Run(name, func(t *testing.T) {
			for who, codec := range map[string]encoding.CodecV2{"ours": wire.NewCodec(pool), "gRPC's": encoding.GetCodecV2(grpcproto.Name)} {
				m, want := make()
				data, err := codec.Marshal(m)
				if err != nil {
					t.Fatal(err)
				}
				got := want.ProtoReflect().New().Interface()
				if err := proto.Unmarshal(data.Materialize(), got); err != nil {
					t.Fatalf("%s: %v", who, err)
				}
				if diff := cmp.Diff(want, got, protocmp.Transform(), cmp.Comparer(bytes.Equal)); diff != "" {
					t.Errorf("%s: (-want +got)\n%s", who, diff)
				}
				data.Free()
				if who == "ours" {
					pool.check(t)
				}
				pool.out = 0 // gRPC's codec leaves buffers to the garbage collector
			}
		})
	}
}

func TestMarshal_refuses_what_is_no_text(t *testing.T) {
	pool := &poisonPool{}
	codec := wire.NewCodec(pool)
	bad := []wire.Digest{{Hash: "\xff"}}
	r := wire.NewBatchReadResponse(pool, bad)
	for _, m := range []proto.Message{
		wire.NewFindMissingRequest("\xff", 0, nil), wire.NewFindMissingRequest("", 0, bad), wire.NewFindMissingResponse(bad), r,
	} {
		if _, err := codec.Marshal(m); err == nil {
			t.Errorf("%T: no error", m)
		}
	}
	if _, err := codec.Marshal("text"); err == nil {
		t.Error("what is no message: no error")
	}
	if err := codec.Unmarshal(nil, "text"); err == nil {
		t.Error("what is no message: no error")
	}
}

// TestWriteRequest_keeps_its_buffers holds that the bytes are those that were
// received, in their buffers, until Free.
func TestWriteRequest_keeps_its_buffers(t *testing.T) {
	pool := &poisonPool{}
	codec := wire.NewCodec(pool)
	body := bytes.Repeat([]byte("0123456789"), 10_000)
	b, err := proto.Marshal(&bytestream.WriteRequest{ResourceName: "name", WriteOffset: 7, Data: body, FinishWrite: true})
	if err != nil {
		t.Fatal(err)
	}
	m := &wire.WriteRequest{}
	for range 2 { // the second time in place of the first
		data := pool.slice(b, 16<<10)
		if err := codec.Unmarshal(data, m); err != nil {
			t.Fatal(err)
		}
		data.Free()
		pieces := m.Pieces()
		if got := pieces.Materialize(); !bytes.Equal(got, body) || len(pieces) != 7 || m.Len() != len(body) {
			t.Errorf("%d bytes in %d pieces, want %d in 7", len(got), len(pieces), len(body))
		}
		if m.ResourceName != "name" || m.WriteOffset != 7 || !m.FinishWrite {
			t.Errorf("%v", &m.WriteRequest)
		}
	}
	if got := m.Bytes(pool); !bytes.Equal(got, body) || &got[0] != &m.Bytes(pool)[0] {
		t.Errorf("Bytes: %d, want %d, the same each time", len(got), len(body))
	}
	taken := m.Take()
	m.Free()
	m.Free()
	if got := taken.Materialize(); !bytes.Equal(got, body) {
		t.Errorf("what was taken: %d bytes, want %d", len(got), len(body))
	}
	taken.Free()
	pool.check(t)
	if m.Len() != 0 || m.Pieces() != nil || m.Bytes(pool) != nil {
		t.Error("there are bytes after Free")
	}
}

func BenchmarkFindMissing(b *testing.B) {
	req := &repb.FindMissingBlobsRequest{}
	for i := range 20_000 {
		req.BlobDigests = append(req.BlobDigests, &repb.Digest{Hash: fmt.Sprintf("%064x", i), SizeBytes: int64(i)})
	}
	enc, err := proto.Marshal(req)
	if err != nil {
		b.Fatal(err)
	}
	pool := wire.NewPool()
	codec := wire.NewCodec(pool)
	data := mem.BufferSlice{mem.SliceBuffer(enc)}
	b.Run("parse/by hand", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := codec.Unmarshal(data, &wire.FindMissingRequest{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parse/generated", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := proto.Unmarshal(enc, &repb.FindMissingBlobsRequest{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
