package rpc_test

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

// TestMessages_without_the_codec holds that the services do the same in a server
// that has gRPC's own codec.
func TestMessages_without_the_codec(t *testing.T) {
	for name, opts := range map[string][]grpc.ServerOption{
		"gRPC's": {grpc.ForceServerCodecV2(encoding.GetCodecV2(grpcproto.Name))},
		"ours":   nil,
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, rpc.Options{}, opts...)
			var update repb.BatchUpdateBlobsRequest
			var read repb.BatchReadBlobsRequest
			var find repb.FindMissingBlobsRequest
			for i := range 300 {
				data := pattern(i * 10)
				d := of(data).Proto()
				if i == 7 {
					data = []byte("another") // INVALID_ARGUMENT, and not found
				}
				update.Requests = append(update.Requests, &repb.BatchUpdateBlobsRequest_Request{Digest: d, Data: data})
				read.Digests = append(read.Digests, d)
				find.BlobDigests = append(find.BlobDigests, d)
			}
			updated, err := s.cas.BatchUpdateBlobs(t.Context(), &update)
			if err != nil {
				t.Fatal(err)
			}
			for i, r := range updated.Responses {
				want := codes.OK
				if i == 7 {
					want = codes.InvalidArgument
				}
				if r.Digest.GetHash() != read.Digests[i].Hash || codes.Code(r.Status.GetCode()) != want { //nolint:gosec // a code
					t.Errorf("update %d: %v", i, r)
				}
			}
			got, err := s.cas.BatchReadBlobs(t.Context(), &read)
			if err != nil {
				t.Fatal(err)
			}
			for i, r := range got.Responses {
				want, data := codes.OK, pattern(i*10)
				if i == 7 {
					want, data = codes.NotFound, nil
				}
				if r.Digest.GetHash() != read.Digests[i].Hash || codes.Code(r.Status.GetCode()) != want || !bytes.Equal(r.Data, data) { //nolint:gosec // a code
					t.Errorf("read %d: %v of %v", i, r.Status, r.Digest)
				}
			}
			missing, err := s.cas.FindMissingBlobs(t.Context(), &find)
			if err != nil || len(missing.MissingBlobDigests) != 1 || missing.MissingBlobDigests[0].Hash != read.Digests[7].Hash {
				t.Errorf("missing: %v, %v; want one", missing, err)
			}
			data := pattern(3<<20 + 1)
			if n, err := s.write(t.Context(), chunks(uploadName(of(data)), data, 1<<20)...); err != nil || n != int64(len(data)) {
				t.Errorf("Write: %d, %v", n, err)
			}
		})
	}
}

// TestWrite_many_at_once has more uploads under way than may work ahead, all of
// which wait for each other in the middle.
func TestWrite_many_at_once(t *testing.T) {
	const uploads = 40
	s := start(t, rpc.Options{})
	halfway := make(chan struct{})
	var wg, begun sync.WaitGroup
	begun.Add(uploads)
	for i := range uploads {
		wg.Go(func() {
			data := append(pattern(300_000), fmt.Sprint(i)...)
			d := of(data)
			msgs := chunks(fmt.Sprintf("uploads/%d/blobs/%s", i, d), data, 20_000)
			if err := writeInHalves(t.Context(), s, msgs, begun.Done, halfway); err != nil {
				t.Error(err)
			}
			s.checkStored(t, d, data)
		})
	}
	begun.Wait()
	close(halfway)
	wg.Wait()
}

// writeInHalves sends half of msgs, calls begun, and sends the rest when halfway
// is closed.
func writeInHalves(ctx context.Context, s *server, msgs []*bytestream.WriteRequest, begun func(), halfway <-chan struct{}) error {
	stream, err := s.streams.Write(ctx)
	for i, m := range msgs {
		if i == len(msgs)/2 {
			begun()
			<-halfway
		}
		if err == nil {
			err = stream.Send(m)
		}
	}
	if err == nil {
		_, err = stream.CloseAndRecv()
	}
	return err
}

func (s *server) checkStored(t *testing.T, d digest.Digest, want []byte) {
	t.Helper()
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	if !bytes.Equal(s.store.blobs[d], want) {
		t.Errorf("blob %s: %d bytes are stored, want %d", d, len(s.store.blobs[d]), len(want))
	}
}
