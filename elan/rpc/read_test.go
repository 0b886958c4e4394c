package rpc_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

// read reads a resource to its end.
func (s *server) read(t *testing.T, req *bytestream.ReadRequest) ([]byte, error) {
	t.Helper()
	stream, err := s.streams.Read(t.Context(), req)
	if err != nil {
		return nil, err
	}
	var data []byte
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return data, nil
		}
		if err != nil {
			return data, err
		}
		data = append(data, msg.Data...)
	}
}

func TestRead_offsets_and_limits(t *testing.T) {
	s := start(t, rpc.Options{})
	data := pattern(2<<20 + 17)
	d := s.store.put(data)
	size := d.Size()
	for _, tc := range []struct{ offset, limit int64 }{
		{0, 0},
		{1, 0},
		{size - 1, 0},
		{size, 0},
		{0, 1},
		{0, size},
		{0, size + 1},
		{0, 1 << 62},
		{1<<20 - 1, 1<<20 + 2},
		{size - 5, 3},
		{size, 7},
	} {
		t.Run(fmt.Sprintf("%d-%d", tc.offset, tc.limit), func(t *testing.T) {
			want := data[tc.offset:]
			if tc.limit > 0 {
				want = want[:min(tc.limit, int64(len(want)))]
			}
			got, err := s.read(t, &bytestream.ReadRequest{ResourceName: "a/b/blobs/" + d.String(), ReadOffset: tc.offset, ReadLimit: tc.limit})
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("read %d bytes, want other %d", len(got), len(want))
			}
		})
	}
}

// Each message of a reader that has stalled is held in memory.
func TestRead_many_at_once(t *testing.T) {
	const readers, most = 128, 40 << 20
	s := start(t, rpc.Options{})
	data := pattern(4 << 20)
	name := "blobs/" + s.store.put(data).String()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var total int
	for range readers {
		stream, err := s.streams.Read(ctx, &bytestream.ReadRequest{ResourceName: name})
		if err != nil {
			t.Fatal(err)
		}
		msg, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		total += len(msg.Data)
	}
	if total > most {
		t.Errorf("%d readers have messages of %d bytes, want at most %d", readers, total, most)
	}
	got, err := s.read(t, &bytestream.ReadRequest{ResourceName: name})
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("one more read %d bytes, %v, want %d", len(got), err, len(data))
	}
}

func TestRead_empty_blob(t *testing.T) {
	s := start(t, rpc.Options{})
	for _, fn := range digest.Functions() {
		got, err := s.read(t, &bytestream.ReadRequest{ResourceName: "blobs/" + digest.Empty(fn).String()})
		if err != nil || len(got) != 0 {
			t.Errorf("Read of the empty %v blob: %q, %v", fn, got, err)
		}
	}
}

func TestRead_refusals(t *testing.T) {
	s := start(t, rpc.Options{})
	d := s.store.put([]byte("hello"))
	absent := of([]byte("absent"))
	short := of([]byte("short of bytes"))
	s.store.blobs[short] = []byte("short of")
	for _, tc := range []struct {
		name string
		req  *bytestream.ReadRequest
		want codes.Code
	}{
		{"malformed", &bytestream.ReadRequest{ResourceName: "blobs/x/5"}, codes.InvalidArgument},
		{"negative offset", &bytestream.ReadRequest{ResourceName: "blobs/" + d.String(), ReadOffset: -1}, codes.OutOfRange},
		{"offset past the end", &bytestream.ReadRequest{ResourceName: "blobs/" + d.String(), ReadOffset: 6}, codes.OutOfRange},
		{"negative limit", &bytestream.ReadRequest{ResourceName: "blobs/" + d.String(), ReadLimit: -1}, codes.InvalidArgument},
		{"absent", &bytestream.ReadRequest{ResourceName: "blobs/" + absent.String()}, codes.NotFound},
		{"absent at its end", &bytestream.ReadRequest{ResourceName: "blobs/" + absent.String(), ReadOffset: absent.Size()}, codes.NotFound},
		{"another size", &bytestream.ReadRequest{ResourceName: "blobs/" + d.Hash() + "/6"}, codes.NotFound},
		{"short in the store", &bytestream.ReadRequest{ResourceName: "blobs/" + short.String()}, codes.Internal},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := s.read(t, tc.req)
			wantCode(t, "Read", err, tc.want)
		})
	}
	s.store.fail(blob.ErrUnavailable)
	_, err := s.read(t, &bytestream.ReadRequest{ResourceName: "blobs/" + d.String()})
	wantCode(t, "Read from a store that is away", err, codes.Unavailable)
}
