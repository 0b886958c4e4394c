package rpc_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

func compressedName(d digest.Digest) string {
	return "main/uploads/8d3a/compressed-blobs/zstd/" + d.String()
}

func TestWriteCompressed_chunk_sizes(t *testing.T) {
	// One is decoded at once, the other as a stream.
	for _, size := range []int{100_003, 3<<20 + 1} {
		data := mixed(size)
		d := of(data)
		z := pack(t, data)
		for _, chunk := range []int{1000, 16 << 10, len(z) - 1, len(z), len(z) + 1} {
			t.Run(fmt.Sprintf("%d-%d", size, chunk), func(t *testing.T) {
				s := start(t, rpc.Options{})
				n, err := s.write(t.Context(), chunks(compressedName(d), z, chunk)...)
				if err != nil || n != int64(len(z)) {
					t.Fatalf("Write: %d, %v, want the %d bytes sent", n, err, len(z))
				}
				if !bytes.Equal(s.store.blobs[d], data) {
					t.Error("the store has other bytes")
				}
				if n := s.store.openWriters(); n != 0 {
					t.Errorf("%d writers are open after the write", n)
				}
				plain, err := s.read(t, &bytestream.ReadRequest{ResourceName: "blobs/" + d.String()})
				if err != nil || !bytes.Equal(plain, data) {
					t.Errorf("read as it is: %d bytes, %v", len(plain), err)
				}
			})
		}
	}
}

func TestWriteCompressed_forms(t *testing.T) {
	data := mixed(2 << 20)
	d := of(data)
	name, z := compressedName(d), pack(t, data)
	half := int64(len(z) / 2)
	two := append(pack(t, data[:1<<20]), pack(t, data[1<<20:])...)
	for _, tc := range []struct {
		name string
		msgs []*bytestream.WriteRequest
	}{
		{name: "empty messages between", msgs: []*bytestream.WriteRequest{
			{ResourceName: name},
			{Data: z[:half]},
			{ResourceName: name, WriteOffset: half},
			{WriteOffset: half, Data: z[half:]},
			{WriteOffset: int64(len(z)), FinishWrite: true},
		}},
		{name: "end without finish_write", msgs: []*bytestream.WriteRequest{{ResourceName: name, Data: z}}},
		{name: "two frames", msgs: chunks(name, two, 100_000)},
		{name: "metadata in the name", msgs: chunks(name+"/some/metadata", z, 100_000)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := start(t, rpc.Options{})
			if n, err := s.write(t.Context(), tc.msgs...); err != nil || n <= 0 {
				t.Fatalf("Write: %d, %v", n, err)
			}
			if !bytes.Equal(s.store.blobs[d], data) {
				t.Error("the store has other bytes")
			}
		})
	}
}

// As Bazel needs it: -1 and nothing else where the blob is there before all of
// it was sent, and no wait for the rest.
func TestWriteCompressed_ends_early_where_the_blob_is_there(t *testing.T) {
	s := start(t, rpc.Options{})
	d := s.store.put(mixed(1 << 20))
	stream, err := s.streams.Write(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&bytestream.WriteRequest{ResourceName: compressedName(d), Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	var resp bytestream.WriteResponse
	if err := stream.RecvMsg(&resp); err != nil || resp.CommittedSize != -1 {
		t.Errorf("Write: %v, %v, want committed_size -1", &resp, err)
	}
	// Also where it was all sent, in the one message.
	z := pack(t, mixed(1<<20))
	if n, err := s.write(t.Context(), chunks(compressedName(d), z, len(z))...); err != nil || n != -1 {
		t.Errorf("Write of it all: %d, %v, want -1", n, err)
	}
	if n, err := s.write(t.Context(), chunks(compressedName(of(nil)), pack(t, nil), 100)...); err != nil || n != -1 {
		t.Errorf("Write of the empty blob: %d, %v, want -1", n, err)
	}
}

func TestWriteCompressed_refusals(t *testing.T) {
	small, large := mixed(100_000), mixed(2<<20)
	d := of(small)
	name, z := compressedName(d), pack(t, small)
	largeName, largeZ := compressedName(of(large)), pack(t, large)
	bomb := pack(t, make([]byte, 64<<20))
	declared := func(size int) string {
		return fmt.Sprintf("uploads/u/compressed-blobs/zstd/%s/%d", d.Hash(), size)
	}
	for _, tc := range []struct {
		name string
		msgs []*bytestream.WriteRequest
		says string
	}{
		{name: "not compressed", msgs: chunks(name, small, 30_000), says: "zstd"},
		{name: "large and not compressed", msgs: chunks(largeName, large, 300_000), says: "zstd"},
		{name: "other bytes", msgs: chunks(name, pack(t, pattern(100_000)), 30_000), says: "digest"},
		{name: "large of other bytes", msgs: chunks(largeName, pack(t, pattern(2<<20)), 300_000), says: "digest"},
		{name: "too few bytes", msgs: chunks(name, pack(t, small[1:]), 30_000), says: "99999 bytes"},
		{name: "large of too few bytes", msgs: chunks(largeName, pack(t, large[1:]), 300_000), says: "bytes"},
		{name: "too many bytes", msgs: chunks(name, pack(t, append(bytes.Clone(small), 'x')), 30_000), says: "zstd"},
		{name: "large of too many bytes", msgs: chunks(largeName, pack(t, append(bytes.Clone(large), 'x')), 300_000), says: "more than"},
		{name: "truncated", msgs: chunks(name, z[:len(z)-10], 30_000), says: "zstd"},
		{name: "large and truncated", msgs: chunks(largeName, largeZ[:len(largeZ)-10], 300_000), says: "zstd"},
		{name: "ended in the middle", msgs: chunks(largeName, largeZ, 300_000)[:2], says: "zstd"},
		{name: "nothing", msgs: []*bytestream.WriteRequest{{ResourceName: name, FinishWrite: true}}, says: "0 bytes"},
		{name: "garbage after", msgs: chunks(name, append(bytes.Clone(z), "garbage"...), 30_000), says: "zstd"},
		{name: "garbage after a large one", msgs: chunks(largeName, append(bytes.Clone(largeZ), "garbage"...), 300_000), says: "zstd"},
		{name: "bomb", msgs: chunks(declared(1000), bomb, 30_000), says: "zstd"},
		{name: "large bomb", msgs: chunks(declared(2<<20), bomb, 30_000), says: "more than 2097152 bytes"},
		{name: "endless", msgs: chunks(declared(1000), bytes.Repeat(pack(t, nil), 20_000), 30_000), says: "compressed bytes"},
		{name: "endless and large", msgs: chunks(declared(2<<20), bytes.Repeat(pack(t, nil), 500_000), 300_000), says: "compressed bytes"},
		{name: "window", msgs: chunks(largeName, pack(t, large, zstd.WithWindowSize(16<<20)), 300_000), says: "window"},
		{name: "declared terabytes", msgs: chunks(declared(1<<62), z, 30_000), says: "too large"},
		{name: "offset in bytes of the blob", msgs: []*bytestream.WriteRequest{
			{ResourceName: name, Data: z[:500]},
			{WriteOffset: 1000, Data: z[500:], FinishWrite: true},
		}, says: "write_offset is 1000, want 500"},
		{name: "begins in the middle", msgs: []*bytestream.WriteRequest{{ResourceName: name, WriteOffset: 5, Data: z[5:]}}, says: "begun anew"},
		{name: "another name later", msgs: []*bytestream.WriteRequest{
			{ResourceName: largeName, Data: largeZ[:500]},
			{ResourceName: name, WriteOffset: 500, Data: largeZ[500:], FinishWrite: true},
		}, says: "resource_name"},
		{name: "deflate", msgs: chunks(strings.Replace(name, "zstd", "deflate", 1), z, 30_000), says: "announces [ZSTD]"},
		{name: "brotli", msgs: chunks(strings.Replace(name, "zstd", "brotli", 1), z, 30_000), says: "announces [ZSTD]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := start(t, rpc.Options{MaxBlobBytes: 1 << 40})
			_, err := s.write(t.Context(), tc.msgs...)
			wantCode(t, "Write", err, codes.InvalidArgument)
			if msg := gstatus.Convert(err).Message(); !strings.Contains(msg, tc.says) {
				t.Errorf("Write: %q, want it to say %q", msg, tc.says)
			}
			if len(s.store.blobs) != 0 || s.store.openWriters() != 0 {
				t.Errorf("%d blobs and %d open writers remain", len(s.store.blobs), s.store.openWriters())
			}
		})
	}
}

func TestWriteCompressed_store_trouble(t *testing.T) {
	for _, data := range [][]byte{mixed(1000), mixed(2 << 20)} {
		for err, want := range map[error]codes.Code{blob.ErrFull: codes.ResourceExhausted, blob.ErrUnavailable: codes.Unavailable} {
			s := start(t, rpc.Options{})
			s.store.fail(err)
			_, err := s.write(t.Context(), chunks(compressedName(of(data)), pack(t, data), 100_000)...)
			wantCode(t, "Write", err, want)
		}
	}
}

func TestWriteCompressed_begins_anew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, rpc.Options{MaxDecoders: 1})
		data := mixed(2 << 20)
		d := of(data)
		name, z := compressedName(d), pack(t, data)
		if q := s.query(t, name); q.CommittedSize != 0 || q.Complete {
			t.Errorf("status before: %v, want nothing", q)
		}
		s.breakOff(t, name, z[:100_000])
		if q := s.query(t, name); q.CommittedSize != 0 || q.Complete {
			t.Errorf("status after breaking off: %v, want nothing", q)
		}
		if n := s.store.openWriters(); n != 0 {
			t.Errorf("%d writers are open after breaking off", n)
		}
		if n, err := s.write(t.Context(), chunks(name, z, 16<<10)...); err != nil || n != int64(len(z)) {
			t.Fatalf("Write: %d, %v, want %d", n, err, len(z))
		}
		if q := s.query(t, name); q.CommittedSize != d.Size() || !q.Complete {
			t.Errorf("status at the end: %v, want complete", q)
		}
	})
}

func TestWriteCompressed_decoders_are_bounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, rpc.Options{MaxDecoders: 1})
		slow, large, small := pattern(2<<20), mixed(2<<20), mixed(1000)
		stream, err := s.streams.Write(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		z := pack(t, slow)
		if err := stream.Send(&bytestream.WriteRequest{ResourceName: compressedName(of(slow)), Data: z[:1000]}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()

		// A small one passes.
		if _, err := s.write(t.Context(), chunks(compressedName(of(small)), pack(t, small), 100)...); err != nil {
			t.Errorf("Write of a small blob beside the slow one: %v", err)
		}
		// A large one waits, as long as its caller does.
		ctx, cancel := context.WithCancel(t.Context())
		written := make(chan error, 2)
		go func() {
			_, err := s.write(ctx, chunks(compressedName(of(large)), pack(t, large), 100_000)...)
			written <- err
		}()
		synctest.Wait()
		select {
		case err := <-written:
			t.Fatalf("Write beside the slow one: %v, want it to wait", err)
		default:
		}
		cancel()
		wantCode(t, "Write that is given up", <-written, codes.Canceled)
		go func() {
			_, err := s.write(t.Context(), chunks(compressedName(of(large)), pack(t, large), 100_000)...)
			written <- err
		}()
		synctest.Wait()
		if err := stream.Send(&bytestream.WriteRequest{WriteOffset: 1000, Data: z[1000:], FinishWrite: true}); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.CloseAndRecv(); err != nil {
			t.Errorf("the slow Write: %v", err)
		}
		if err := <-written; err != nil {
			t.Errorf("Write after the slow one: %v", err)
		}
	})
}

// FuzzWriteCompressed holds that no bytes, in no messages, make another blob
// visible than the one that is named, and that each stream gets an answer.
func FuzzWriteCompressed(f *testing.F) {
	small, large := []byte("hello, world"), mixed(1<<20+100)
	f.Add(pack(f, small), uint16(5), false)
	f.Add(append(pack(f, small[:5]), pack(f, small[5:])...), uint16(3), false)
	f.Add(append(pack(f, small), "tail"...), uint16(100), false)
	f.Add(pack(f, large), uint16(60_000), true)
	f.Add(pack(f, large)[:10_000], uint16(1000), true)
	f.Fuzz(func(t *testing.T, z []byte, chunk uint16, stream bool) {
		s := start(t, rpc.Options{})
		data := small
		if stream {
			data = large
		}
		d := of(data)
		msgs := chunks(compressedName(d), z, max(int(chunk), 1+len(z)/100))
		n, err := s.write(t.Context(), msgs...)
		stored, ok := s.store.blobs[d]
		switch {
		case ok && !bytes.Equal(stored, data):
			t.Errorf("%d other bytes are stored", len(stored))
		case ok != (err == nil):
			t.Errorf("stored: %t, error %v", ok, err)
		case err == nil && n != int64(len(z)):
			t.Errorf("committed_size is %d of %d bytes", n, len(z))
		case err != nil && gstatus.Code(err) != codes.InvalidArgument:
			t.Errorf("error %v, want INVALID_ARGUMENT", err)
		}
		if len(s.store.blobs) > 1 || s.store.openWriters() != 0 {
			t.Errorf("%d blobs and %d open writers remain", len(s.store.blobs), s.store.openWriters())
		}
	})
}
