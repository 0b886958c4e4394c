package rpc_test

import (
	"bytes"
	"fmt"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/compressed"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/rpc"
)

// startKeeping starts a server whose store keeps blobs as zstd.
func startKeeping(t *testing.T) *server {
	t.Helper()
	m, err := mem.New(mem.Options{Containers: true})
	if err != nil {
		t.Fatal(err)
	}
	c, err := compressed.New(compressed.Options{Store: m})
	if err != nil {
		t.Fatal(err)
	}
	return startOver(t, struct {
		blob.CompressedOpener
		blob.CompressedReceiver
		blob.Store
		blob.Entries
	}{c, c, c, m}, rpc.Options{})
}

// What comes as zstd, and is kept so, goes as it came to who wants it so, and as
// it is to others; whichever way it came.
func TestCompressed_keptAsItCame(t *testing.T) {
	for _, size := range []int{5000, 1 << 20, 3<<20 + 17} {
		data := mixed(size)
		d, z := of(data), pack(t, data)
		for _, way := range []string{"stream", "batch", "plain"} {
			if way == "batch" && size > 1<<20 {
				continue
			}
			t.Run(fmt.Sprint(way, "/", size), func(t *testing.T) {
				s := startKeeping(t)
				switch way {
				case "stream":
					if n, err := s.write(t.Context(), chunks(compressedName(d), z, 100_000)...); err != nil || n != int64(len(z)) {
						t.Fatalf("Write: %d, %v, want the %d bytes sent", n, err, len(z))
					}
				case "batch":
					resp, err := s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: []*repb.BatchUpdateBlobsRequest_Request{
						{Digest: d.Proto(), Data: z, Compressor: repb.Compressor_ZSTD},
					}})
					if err != nil || codes.Code(resp.Responses[0].Status.GetCode()) != codes.OK { //nolint:gosec // a code
						t.Fatal(resp, err)
					}
				default:
					if _, err := s.write(t.Context(), chunks("uploads/8d3a/blobs/"+d.String(), data, 100_000)...); err != nil {
						t.Fatal(err)
					}
				}
				got, err := s.read(t, &bytestream.ReadRequest{ResourceName: "compressed-blobs/zstd/" + d.String()})
				if err != nil || !bytes.Equal(unpack(t, got), data) {
					t.Errorf("read as zstd: %d bytes, %v", len(got), err)
				}
				if same := bytes.Equal(got, z); !same && way != "plain" {
					t.Errorf("sent as %d other bytes than the %d that came", len(got), len(z))
				}
				got, err = s.read(t, &bytestream.ReadRequest{ResourceName: "compressed-blobs/zstd/" + d.String(), ReadOffset: 1234})
				if err != nil || !bytes.Equal(unpack(t, got), data[1234:]) {
					t.Errorf("read as zstd from an offset: %d bytes, %v", len(got), err)
				}
				got, err = s.read(t, &bytestream.ReadRequest{ResourceName: "blobs/" + d.String(), ReadOffset: 99})
				if err != nil || !bytes.Equal(got, data[99:]) {
					t.Errorf("read as it is: %d bytes, %v", len(got), err)
				}
			})
		}
	}
}

// Wrong bytes are the sender's fault, in words, however blobs are kept.
func TestCompressed_keptRefusals(t *testing.T) {
	s := startKeeping(t)
	data := mixed(100_000)
	for name, z := range map[string][]byte{"other": pack(t, data[1:]), "garbage": data, "cut": pack(t, data)[:1000]} {
		_, err := s.write(t.Context(), chunks(compressedName(of(data)), z, 10_000)...)
		wantCode(t, name, err, codes.InvalidArgument)
	}
	_, err := s.read(t, &bytestream.ReadRequest{ResourceName: "compressed-blobs/zstd/" + of(data).String()})
	wantCode(t, "read of what was refused", err, codes.NotFound)
}
