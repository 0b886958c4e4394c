package rpc_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

func uploadName(d digest.Digest) string { return "main/uploads/8d3a/blobs/" + d.String() }

// write sends messages on one stream and returns the answer.
func (s *server) write(ctx context.Context, msgs ...*bytestream.WriteRequest) (int64, error) {
	stream, err := s.streams.Write(ctx)
	if err != nil {
		return 0, err
	}
	for _, m := range msgs {
		// Where the server has ended the call, its answer tells why.
		if err := stream.Send(m); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return 0, err
		}
	}
	resp, err := stream.CloseAndRecv()
	return resp.GetCommittedSize(), err
}

// chunks are the messages that write data in pieces of size bytes.
func chunks(name string, data []byte, size int) []*bytestream.WriteRequest {
	var msgs []*bytestream.WriteRequest
	for off := 0; off < len(data); off += size {
		end := min(off+size, len(data))
		msgs = append(msgs, &bytestream.WriteRequest{
			ResourceName: name, WriteOffset: int64(off), Data: data[off:end], FinishWrite: end == len(data),
		})
		name = ""
	}
	return msgs
}

func TestWrite_chunk_sizes(t *testing.T) {
	data := pattern(100_003)
	for _, size := range []int{100, 1 << 10, 16 << 10, 99_999, 100_002, 100_003, 1 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			s := start(t, rpc.Options{})
			d := of(data)
			n, err := s.write(t.Context(), chunks(uploadName(d), data, size)...)
			if err != nil || n != d.Size() {
				t.Fatalf("Write: %d, %v, want %d", n, err, d.Size())
			}
			if !bytes.Equal(s.store.blobs[d], data) {
				t.Error("the store has other bytes")
			}
			if n := s.store.openWriters(); n != 0 {
				t.Errorf("%d writers are open after the write", n)
			}
		})
	}
}

func TestWrite_forms(t *testing.T) {
	data := []byte("hello, world")
	d := of(data)
	name := uploadName(d)
	for _, tc := range []struct {
		name string
		msgs []*bytestream.WriteRequest
	}{
		{name: "name repeated", msgs: []*bytestream.WriteRequest{
			{ResourceName: name, Data: data[:5]},
			{ResourceName: name, WriteOffset: 5, Data: data[5:], FinishWrite: true},
		}},
		{name: "empty messages between", msgs: []*bytestream.WriteRequest{
			{ResourceName: name},
			{Data: data[:5]},
			{WriteOffset: 5},
			{WriteOffset: 5, Data: data[5:]},
			{WriteOffset: 12, FinishWrite: true},
		}},
		{name: "end without finish_write", msgs: []*bytestream.WriteRequest{{ResourceName: name, Data: data}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := start(t, rpc.Options{})
			n, err := s.write(t.Context(), tc.msgs...)
			if err != nil || n != d.Size() {
				t.Fatalf("Write: %d, %v, want %d", n, err, d.Size())
			}
			if !bytes.Equal(s.store.blobs[d], data) {
				t.Error("the store has other bytes")
			}
		})
	}
}

func TestWrite_empty_blob(t *testing.T) {
	s := start(t, rpc.Options{})
	n, err := s.write(t.Context(), &bytestream.WriteRequest{ResourceName: uploadName(digest.Empty(digest.BLAKE3)), FinishWrite: true})
	if err != nil || n != 0 {
		t.Errorf("Write: %d, %v, want 0", n, err)
	}
}

func TestWrite_ends_early_where_the_blob_is_there(t *testing.T) {
	s := start(t, rpc.Options{})
	d := s.store.put(pattern(1 << 20))
	// Only a part is sent, and the stream is not closed.
	stream, err := s.streams.Write(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&bytestream.WriteRequest{ResourceName: uploadName(d), Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	var resp bytestream.WriteResponse
	if err := stream.RecvMsg(&resp); err != nil || resp.CommittedSize != d.Size() {
		t.Errorf("Write: %v, %v, want committed_size %d", &resp, err, d.Size())
	}
}

func TestWrite_refusals(t *testing.T) {
	data := []byte("hello, world")
	d := of(data)
	name := uploadName(d)
	other := of([]byte("other"))
	for _, tc := range []struct {
		name string
		msgs []*bytestream.WriteRequest
		want codes.Code
		says string
	}{
		{name: "nothing sent", want: codes.InvalidArgument, says: "resource_name"},
		{name: "no name", msgs: []*bytestream.WriteRequest{{Data: data}}, want: codes.InvalidArgument, says: "uploads/"},
		{name: "name to read", msgs: []*bytestream.WriteRequest{{ResourceName: "blobs/" + d.String()}}, want: codes.InvalidArgument, says: "uploads/"},
		{name: "other bytes", msgs: chunks(name, []byte("hello, World"), 100), want: codes.InvalidArgument, says: "digest"},
		{name: "other bytes in two messages", msgs: chunks(name, []byte("hello, World"), 7), want: codes.InvalidArgument, says: "digest"},
		{name: "too few bytes", msgs: chunks(name, data[:11], 100), want: codes.InvalidArgument, says: "11 bytes"},
		{name: "too few bytes in two messages", msgs: chunks(name, data[:11], 6), want: codes.InvalidArgument, says: "11 bytes"},
		{name: "too many bytes", msgs: chunks(name, append(bytes.Clone(data), '!'), 100), want: codes.InvalidArgument, says: "13 bytes"},
		{name: "too many bytes in two messages", msgs: chunks(name, append(bytes.Clone(data), '!'), 7), want: codes.InvalidArgument, says: "12 bytes"},
		{
			name: "another name later", want: codes.InvalidArgument, says: other.String(),
			msgs: []*bytestream.WriteRequest{{ResourceName: name, Data: data[:5]}, {ResourceName: uploadName(other), WriteOffset: 5, Data: data[5:], FinishWrite: true}},
		},
		{
			name: "offset ahead", want: codes.InvalidArgument, says: "write_offset is 6, want 5",
			msgs: []*bytestream.WriteRequest{{ResourceName: name, Data: data[:5]}, {WriteOffset: 6, Data: data[6:], FinishWrite: true}},
		},
		{
			name: "offset behind", want: codes.InvalidArgument, says: "write_offset is 0, want 5",
			msgs: []*bytestream.WriteRequest{{ResourceName: name, Data: data[:5]}, {Data: data[5:], FinishWrite: true}},
		},
		{name: "begins in the middle", msgs: []*bytestream.WriteRequest{{ResourceName: name, WriteOffset: 5, Data: data[5:]}}, want: codes.Aborted, says: "write_offset is 5, and nothing of this upload is here"},
		{name: "negative offset", msgs: []*bytestream.WriteRequest{{ResourceName: name, WriteOffset: -1, Data: data}}, want: codes.InvalidArgument, says: "write_offset is -1, outside"},
		{
			name: "offset behind the end", want: codes.InvalidArgument, says: "outside",
			msgs: []*bytestream.WriteRequest{{ResourceName: name, WriteOffset: int64(len(data)) + 1}},
		},
		{
			name: "over the limit", want: codes.InvalidArgument, says: "too large",
			msgs: []*bytestream.WriteRequest{{ResourceName: "uploads/u/blobs/" + d.Hash() + "/1000001", Data: data}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := start(t, rpc.Options{MaxBlobBytes: 1_000_000})
			_, err := s.write(t.Context(), tc.msgs...)
			wantCode(t, "Write", err, tc.want)
			if msg := gstatus.Convert(err).Message(); !strings.Contains(msg, tc.says) {
				t.Errorf("Write: %q, want it to say %q", msg, tc.says)
			}
			if len(s.store.blobs) != 0 || s.store.openWriters() != 0 {
				t.Errorf("%d blobs and %d open writers remain", len(s.store.blobs), s.store.openWriters())
			}
		})
	}
}

func TestWrite_declared_terabytes_cost_nothing(t *testing.T) {
	s := start(t, rpc.Options{})
	name := "uploads/u/blobs/" + of([]byte("x")).Hash() + "/9223372036854775807"
	_, err := s.write(t.Context(), &bytestream.WriteRequest{ResourceName: name, Data: []byte("x"), FinishWrite: true})
	wantCode(t, "Write", err, codes.InvalidArgument)
}

func TestWrite_store_trouble(t *testing.T) {
	data := []byte("hello, world")
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{err: blob.ErrFull, want: codes.ResourceExhausted},
		{err: blob.ErrUnavailable, want: codes.Unavailable},
		{err: errors.New("bad disk"), want: codes.Internal},
	} {
		s := start(t, rpc.Options{})
		s.store.fail(tc.err)
		_, err := s.write(t.Context(), chunks(uploadName(of(data)), data, 5)...)
		wantCode(t, "Write", err, tc.want)
	}
}

// breakOff sends a part of data and breaks the stream off. It returns when the
// server has noticed.
func (s *server) breakOff(t *testing.T, name string, data []byte) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := s.streams.Write(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&bytestream.WriteRequest{ResourceName: name, Data: data}); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	cancel()
	synctest.Wait()
}

func (s *server) query(t *testing.T, name string) *bytestream.QueryWriteStatusResponse {
	t.Helper()
	resp, err := s.streams.QueryWriteStatus(t.Context(), &bytestream.QueryWriteStatusRequest{ResourceName: name})
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func TestWrite_resumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, rpc.Options{})
		data := pattern(100_000)
		d := of(data)
		name := uploadName(d)
		if q := s.query(t, name); q.CommittedSize != 0 || q.Complete {
			t.Errorf("status before: %v, want nothing", q)
		}
		s.breakOff(t, name, data[:30_000])
		if q := s.query(t, name); q.CommittedSize != 30_000 || q.Complete {
			t.Errorf("status after breaking off: %v, want 30000", q)
		}
		_, err := s.write(t.Context(), &bytestream.WriteRequest{ResourceName: name, WriteOffset: 20_000, Data: data[20_000:], FinishWrite: true})
		wantCode(t, "Write at another offset", err, codes.InvalidArgument)
		n, err := s.write(t.Context(), &bytestream.WriteRequest{ResourceName: name, WriteOffset: 30_000, Data: data[30_000:], FinishWrite: true})
		if err != nil || n != d.Size() {
			t.Fatalf("Write of the rest: %d, %v", n, err)
		}
		if !bytes.Equal(s.store.blobs[d], data) {
			t.Error("the store has other bytes")
		}
		if q := s.query(t, name); q.CommittedSize != d.Size() || !q.Complete {
			t.Errorf("status at the end: %v, want complete", q)
		}
		if n := s.store.openWriters(); n != 0 {
			t.Errorf("%d writers are open", n)
		}
	})
}

func TestWrite_half_closed_stream_tells_how_far_it_came(t *testing.T) {
	s := start(t, rpc.Options{})
	data := pattern(1000)
	d := of(data)
	name := uploadName(d)
	n, err := s.write(t.Context(), &bytestream.WriteRequest{ResourceName: name, Data: data[:300]})
	if err != nil || n != 300 {
		t.Fatalf("Write of a part: %d, %v, want 300", n, err)
	}
	n, err = s.write(t.Context(), &bytestream.WriteRequest{ResourceName: name, WriteOffset: 300, Data: data[300:], FinishWrite: true})
	if err != nil || n != 1000 {
		t.Fatalf("Write of the rest: %d, %v, want 1000", n, err)
	}
}

func TestWrite_begins_anew_at_zero(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, rpc.Options{})
		data := pattern(1000)
		d := of(data)
		s.breakOff(t, uploadName(d), []byte("these are not its bytes"))
		n, err := s.write(t.Context(), chunks(uploadName(d), data, 300)...)
		if err != nil || n != d.Size() {
			t.Fatalf("Write: %d, %v", n, err)
		}
		if n := s.store.openWriters(); n != 0 {
			t.Errorf("%d writers are open", n)
		}
	})
}

func TestWrite_takes_over_from_a_stream_that_still_looks_alive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, rpc.Options{})
		data := pattern(1000)
		d := of(data)
		name := uploadName(d)
		ctx, cancel := context.WithCancel(t.Context())
		old, err := s.streams.Write(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := old.Send(&bytestream.WriteRequest{ResourceName: name, Data: data[:300]}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		rest := &bytestream.WriteRequest{ResourceName: name, WriteOffset: 300, Data: data[300:], FinishWrite: true}

		_, err = s.write(t.Context(), rest)
		wantCode(t, "Write beside a live stream", err, codes.Aborted)

		time.AfterFunc(time.Second, cancel)
		n, err := s.write(t.Context(), rest)
		if err != nil || n != d.Size() {
			t.Errorf("Write when the old stream breaks: %d, %v, want %d", n, err, d.Size())
		}
	})
}

func TestWrite_partial_uploads_are_bounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, rpc.Options{MaxPartialUploads: 3, MaxPartialAge: time.Minute})
		var names []string
		for i := range 5 {
			names = append(names, uploadName(of(fmt.Append(nil, "blob ", i))))
			s.breakOff(t, names[i], []byte("bl"))
		}
		if n := s.store.openWriters(); n != 3 {
			t.Errorf("%d uploads are kept, want 3", n)
		}
		for i, name := range names {
			want := int64(2)
			if i < 2 {
				want = 0 // the oldest are gone
			}
			if got := s.query(t, name).CommittedSize; got != want {
				t.Errorf("upload %d has %d bytes, want %d", i, got, want)
			}
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := s.store.openWriters(); n != 0 {
			t.Errorf("%d uploads are kept after their time", n)
		}
		if got := s.query(t, names[4]).CommittedSize; got != 0 {
			t.Errorf("an upload has %d bytes after its time, want 0", got)
		}
	})
}

func TestQueryWriteStatus_refusals(t *testing.T) {
	s := start(t, rpc.Options{})
	for _, name := range []string{"", "blobs/" + of([]byte("x")).String(), "uploads/u/compressed-blobs/brotli/" + of([]byte("x")).String()} {
		_, err := s.streams.QueryWriteStatus(t.Context(), &bytestream.QueryWriteStatusRequest{ResourceName: name})
		wantCode(t, "QueryWriteStatus of "+name, err, codes.InvalidArgument)
	}
}

// FuzzWrite holds that no sequence of messages makes a blob of other bytes
// visible or leaves a writer open, and that each gets an answer.
func FuzzWrite(f *testing.F) {
	f.Add([]byte("hello"), []byte{5, 0, 1})
	f.Add([]byte("hello, world"), []byte{3, 0, 0, 9, 3, 1})
	f.Add([]byte("hello, world"), []byte{3, 0, 0, 9, 2, 1})
	f.Fuzz(func(t *testing.T, data, script []byte) {
		s := start(t, rpc.Options{MaxPartialUploads: 1})
		d := of(data)
		var msgs []*bytestream.WriteRequest
		name, rest := uploadName(d), data
		for len(script) >= 3 && len(msgs) < 20 {
			n := min(int(script[0]), len(rest))
			msgs = append(msgs, &bytestream.WriteRequest{ResourceName: name, Data: rest[:n], WriteOffset: int64(script[1]), FinishWrite: script[2]&1 != 0})
			if script[2]&2 == 0 {
				rest = rest[n:]
			}
			name, script = "", script[3:]
		}
		n, err := s.write(t.Context(), msgs...)
		stored, ok := s.store.blobs[d]
		if ok && !bytes.Equal(stored, data) {
			t.Errorf("%q is stored for %q", stored, data)
		}
		if err == nil && n == d.Size() && !ok && !d.IsEmpty() {
			t.Error("a complete write was acknowledged and is not there")
		}
		if open := s.store.openWriters(); open > 1 {
			t.Errorf("%d writers are open", open)
		}
	})
}
