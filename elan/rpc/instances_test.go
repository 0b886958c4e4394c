package rpc_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/instances"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/compress"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
	"github.com/mettle-build/mettle/elan/rpc"
)

// startIsolated starts a server whose instances have blobs of their own.
func startIsolated(t *testing.T) *server {
	t.Helper()
	store := newFakeStore()
	stores, err := instances.New(t.Context(), store)
	if err != nil {
		t.Fatal(err)
	}
	failures, err := action.NewFailures(action.FailuresOptions{Entries: store})
	if err != nil {
		t.Fatal(err)
	}
	return startOn(t, store, rpc.Options{Stores: stores.Of, Failures: failures})
}

// TestInstances_apart: what instance a has, instance b can't read, find, or learn
// of by what an upload is answered.
func TestInstances_apart(t *testing.T) {
	s := startIsolated(t)
	data := pattern(100 << 10)
	d := of(data)
	if n, err := s.write(t.Context(), chunks("a/uploads/u/blobs/"+d.String(), data, 64<<10)...); err != nil || n != d.Size() {
		t.Fatalf("write in a: %d, %v", n, err)
	}
	for _, instance := range []string{"b", "", "a/c"} {
		s.wantNothing(t, instance, d)
	}
	find, err := s.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{InstanceName: "a", BlobDigests: []*repb.Digest{d.Proto()}})
	if err != nil || len(find.MissingBlobDigests) != 0 {
		t.Errorf("find in a: missing %v, %v", find.GetMissingBlobDigests(), err)
	}
	if got, err := s.read(t, &bytestream.ReadRequest{ResourceName: "a/blobs/" + d.String()}); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read in a: %d bytes, %v", len(got), err)
	}
}

// wantNothing fails the test where an instance knows anything of d.
func (s *server) wantNothing(t *testing.T, instance string, d digest.Digest) {
	t.Helper()
	ctx := t.Context()
	find, err := s.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{InstanceName: instance, BlobDigests: []*repb.Digest{d.Proto()}})
	if err != nil || len(find.MissingBlobDigests) != 1 {
		t.Errorf("find in %q: missing %v, %v; want the blob", instance, find.GetMissingBlobDigests(), err)
	}
	batch, err := s.cas.BatchReadBlobs(ctx, &repb.BatchReadBlobsRequest{InstanceName: instance, Digests: []*repb.Digest{d.Proto()}})
	if err != nil || batch.Responses[0].Status.Code != int32(codes.NotFound) || len(batch.Responses[0].Data) > 0 {
		t.Errorf("batch read in %q: %v, %v; want NOT_FOUND", instance, batch.GetResponses(), err)
	}
	for _, kind := range []string{"", "compressed-blobs/zstd/"} {
		name := resource.Name{Instance: instance, Digest: d}
		if kind != "" {
			name.Compressor = repb.Compressor_ZSTD
		}
		_, err = s.read(t, &bytestream.ReadRequest{ResourceName: name.String()})
		wantCode(t, "read in "+instance, err, codes.NotFound)
		name.UUID = "u"
		query, err := s.streams.QueryWriteStatus(ctx, &bytestream.QueryWriteStatusRequest{ResourceName: name.String()})
		if err != nil || query.Complete || query.CommittedSize != 0 {
			t.Errorf("query in %q: %v, %v; want nothing", instance, query, err)
		}
		// An upload that ends early would say that the blob is there.
		_, err = s.write(ctx, &bytestream.WriteRequest{ResourceName: name.String(), Data: []byte("not the blob"), FinishWrite: true})
		wantCode(t, "write other bytes in "+instance, err, codes.InvalidArgument)
	}
	up, err := s.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{
		InstanceName: instance, Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: d.Proto(), Data: []byte("not the blob")}},
	})
	if err != nil || up.Responses[0].Status.Code != int32(codes.InvalidArgument) {
		t.Errorf("batch update with other bytes in %q: %v, %v; want INVALID_ARGUMENT", instance, up, err)
	}
	r := &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "out", Digest: d.Proto()}}}
	_, err = s.actions.UpdateActionResult(ctx, &repb.UpdateActionResultRequest{InstanceName: instance, ActionDigest: of([]byte("action")).Proto(), ActionResult: r})
	wantCode(t, "update a result that names it in "+instance, err, codes.FailedPrecondition)
}

// TestInstances_everything: each call works within an instance.
func TestInstances_everything(t *testing.T) {
	s := startIsolated(t)
	small, large := []byte("small"), pattern(3<<20)
	codec, err := compress.New()
	if err != nil {
		t.Fatal(err)
	}
	up, err := s.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{
		InstanceName: "a", Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: of(small).Proto(), Data: small}},
	})
	if err != nil || up.Responses[0].Status.Code != 0 {
		t.Fatalf("batch update: %v, %v", up, err)
	}
	name := resource.Name{Instance: "a", UUID: "u", Digest: of(large), Compressor: repb.Compressor_ZSTD}.String()
	if _, err := s.write(t.Context(), chunks(name, codec.Append(nil, large), 100<<10)...); err != nil {
		t.Fatalf("compressed write: %v", err)
	}
	// The same again ends early, for it is there.
	if n, err := s.write(t.Context(), &bytestream.WriteRequest{ResourceName: name}); err != nil || n != -1 {
		t.Errorf("compressed write again: %d, %v; want -1", n, err)
	}
	dir := &repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: of(small).Proto()}}}
	d, raw, err := digest.OfMessage(digest.SHA256, dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.write(t.Context(), chunks("a/uploads/u/blobs/"+d.String(), raw, len(raw))...); err != nil {
		t.Fatal(err)
	}
	if pages, err := s.getTree(t, &repb.GetTreeRequest{InstanceName: "a", RootDigest: d.Proto()}); err != nil || len(pages[0].Directories) != 1 {
		t.Errorf("GetTree in a: %v, %v", pages, err)
	}
	_, err = s.getTree(t, &repb.GetTreeRequest{InstanceName: "b", RootDigest: d.Proto()})
	wantCode(t, "GetTree in b", err, codes.NotFound)

	key := of([]byte("action")).Proto()
	r := &repb.ActionResult{
		StdoutDigest:      of(small).Proto(),
		OutputDirectories: []*repb.OutputDirectory{{Path: "d", RootDirectoryDigest: d.Proto()}},
		OutputFiles:       []*repb.OutputFile{{Path: "l", Digest: of(large).Proto()}},
	}
	if _, err := s.actions.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{InstanceName: "a", ActionDigest: key, ActionResult: r}); err != nil {
		t.Fatal(err)
	}
	got, err := s.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{InstanceName: "a", ActionDigest: key, InlineStdout: true})
	if err != nil || string(got.StdoutRaw) != "small" {
		t.Errorf("result in a: %v, %v", got, err)
	}
	_, err = s.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{InstanceName: "b", ActionDigest: key})
	wantCode(t, "result in b", err, codes.NotFound)
}

// TestInstances_names: those that could not stand in resource names are refused by
// every call, with words.
func TestInstances_names(t *testing.T) {
	s := start(t, rpc.Options{})
	d := of([]byte("x")).Proto()
	for _, name := range []string{"blobs", "a/uploads", "actions/b", "x/actionResults/y", "operations", "capabilities", "compressed-blobs", "a\x00", "a\nb", strings.Repeat("a", 1025)} {
		ctx := t.Context()
		_, err := s.capabilities.GetCapabilities(ctx, &repb.GetCapabilitiesRequest{InstanceName: name})
		wantCode(t, "GetCapabilities of "+name, err, codes.InvalidArgument)
		if err != nil && !strings.Contains(err.Error(), "instance name") {
			t.Errorf("%q: %v, want it to say that the instance name is wrong", name, err)
		}
		_, err = s.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{InstanceName: name})
		wantCode(t, "FindMissingBlobs", err, codes.InvalidArgument)
		_, err = s.cas.BatchReadBlobs(ctx, &repb.BatchReadBlobsRequest{InstanceName: name})
		wantCode(t, "BatchReadBlobs", err, codes.InvalidArgument)
		_, err = s.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{InstanceName: name})
		wantCode(t, "BatchUpdateBlobs", err, codes.InvalidArgument)
		_, err = s.getTree(t, &repb.GetTreeRequest{InstanceName: name, RootDigest: d})
		wantCode(t, "GetTree", err, codes.InvalidArgument)
		_, err = s.actions.GetActionResult(ctx, &repb.GetActionResultRequest{InstanceName: name, ActionDigest: d})
		wantCode(t, "GetActionResult", err, codes.InvalidArgument)
		_, err = s.actions.UpdateActionResult(ctx, &repb.UpdateActionResultRequest{InstanceName: name, ActionDigest: d, ActionResult: &repb.ActionResult{}})
		wantCode(t, "UpdateActionResult", err, codes.InvalidArgument)
	}
	for _, name := range []string{"main", "a/b/c", "blobs2", "Blobs", "with space", "ümläut", "a//b", "/", strings.Repeat("a", 1024)} {
		_, err := s.capabilities.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{InstanceName: name})
		wantCode(t, "GetCapabilities of "+name, err, codes.OK)
	}
}

// TestInstances_chunks_apart: nor does it learn of a blob, or of its chunks, by the
// calls about chunks, though the lists are entries of one store.
func TestInstances_chunks_apart(t *testing.T) {
	inner, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	store, err := chunked.New(chunked.Options{Store: inner, Entries: inner})
	if err != nil {
		t.Fatal(err)
	}
	stores, err := instances.New(t.Context(), store)
	if err != nil {
		t.Fatal(err)
	}
	s := startOver(t, store, rpc.Options{Stores: stores.Of})
	data := pattern(3 << 20)
	d, sha := of(data), repb.DigestFunction_SHA256
	var ds []*repb.Digest
	for part := range slices.Chunk(data, 1<<20) {
		name := "a/uploads/u/blobs/" + of(part).String()
		if _, err := s.write(t.Context(), chunks(name, part, len(part))...); err != nil {
			t.Fatal(err)
		}
		ds = append(ds, of(part).Proto())
	}
	splice := func(instance string) error {
		_, err := s.cas.SpliceBlob(t.Context(), &repb.SpliceBlobRequest{InstanceName: instance, BlobDigest: d.Proto(), ChunkDigests: ds, DigestFunction: sha})
		return err
	}
	split := func(instance string, fn repb.ChunkingFunction_Value) error {
		_, err := s.cas.SplitBlob(t.Context(), &repb.SplitBlobRequest{InstanceName: instance, BlobDigest: d.Proto(), DigestFunction: sha, ChunkingFunction: fn})
		return err
	}
	functions := []repb.ChunkingFunction_Value{repb.ChunkingFunction_UNKNOWN, repb.ChunkingFunction_FAST_CDC_2020, repb.ChunkingFunction_REP_MAX_CDC}
	wantCode(t, "splice in a", splice("a"), codes.OK)
	for _, fn := range functions {
		wantCode(t, "split in a", split("a", fn), codes.OK)
	}
	if got, err := s.read(t, &bytestream.ReadRequest{ResourceName: "a/blobs/" + d.String()}); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read in a: %d bytes, %v", len(got), err)
	}
	for _, instance := range []string{"b", "", "a/c"} {
		s.wantNothing(t, instance, d)
		wantCode(t, "splice in "+instance, splice(instance), codes.NotFound)
		for _, fn := range functions {
			wantCode(t, "split in "+instance, split(instance, fn), codes.NotFound)
		}
		stream, err := s.cas.RegisterChunkMapping(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&repb.RegisterChunkMappingRequest{InstanceName: instance, BlobDigest: d.Proto(), ChunkDigests: ds, DigestFunction: sha}); err != nil {
			t.Fatal(err)
		}
		_, err = stream.CloseAndRecv()
		wantCode(t, "register in "+instance, err, codes.NotFound)
		mapping, err := s.cas.GetChunkMapping(t.Context(), &repb.GetChunkMappingRequest{InstanceName: instance, BlobDigest: d.Proto(), DigestFunction: sha})
		if err == nil {
			_, err = mapping.Recv()
		}
		wantCode(t, "get the mapping in "+instance, err, codes.NotFound)
	}
}
