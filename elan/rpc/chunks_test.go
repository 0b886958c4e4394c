package rpc_test

import (
	"bytes"
	"fmt"
	"net"
	"slices"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/instances"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

// openChunked opens a store of chunks in files.
func openChunked(tb testing.TB) *chunked.Local {
	tb.Helper()
	files, err := file.New(file.Options{Dir: tb.TempDir()})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := files.Close(); err != nil {
			tb.Error(err)
		}
	})
	store, err := chunked.NewLocal(files, chunked.Options{Entries: files})
	if err != nil {
		tb.Fatal(err)
	}
	return store
}

// startTCP starts the server of the mains, on a socket.
func startTCP(tb testing.TB, store *chunked.Local) *server {
	tb.Helper()
	actions, err := action.New(action.Options{Store: store, Entries: store})
	if err != nil {
		tb.Fatal(err)
	}
	g, _ := rpc.NewServer()
	if err := rpc.Register(g, rpc.Options{Store: store, Actions: actions}); err != nil {
		tb.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(tb.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	return connect(tb, g, l, l.Addr().String())
}

// atRest is the number of bytes that the store keeps.
func atRest(tb testing.TB, s *chunked.Local) (n int64) {
	tb.Helper()
	for info, err := range s.Blobs(tb.Context()) {
		if err != nil {
			tb.Fatal(err)
		}
		n += info.StoredBytes
	}
	return n
}

// TestChunks_edit: an upload and a download of an edited blob move the chunks
// around the edit, and these alone come to rest.
func TestChunks_edit(t *testing.T) {
	const size = 20 << 20
	data := randomBlob(size)
	edit := edited(data)
	for name, c := range map[string]struct {
		fn       repb.ChunkingFunction_Value
		newCalls bool
	}{
		"bazel_8_7":          {repb.ChunkingFunction_FAST_CDC_2020, false},
		"by_the_calls_of_13": {repb.ChunkingFunction_REP_MAX_CDC, true},
	} {
		t.Run(name, func(t *testing.T) {
			store := openChunked(t)
			s := startTCP(t, store)
			up, down := newChunkClient(t, s, c.fn, c.newCalls), newChunkClient(t, s, c.fn, c.newCalls)
			total, moved := up.upload(data)
			if up.up != size || moved != total || total < 20 {
				t.Errorf("first upload: %d of %d chunks, %d bytes", moved, total, up.up)
			}
			if got, _, _ := down.download(of(data)); !bytes.Equal(got, data) || down.down != size {
				t.Errorf("first download: %d bytes moved", down.down)
			}
			before := atRest(t, store)
			total, moved = up.upload(edit)
			movedUp := up.up - size
			if moved < 1 || moved > 4 {
				t.Errorf("upload of the edit: %d of %d chunks", moved, total)
			}
			rest := atRest(t, store)
			if rest-before > movedUp+64<<10 {
				t.Errorf("%d bytes at rest, %d before; %d were uploaded", rest, before, movedUp)
			}
			if got, _, moved := down.download(of(edit)); !bytes.Equal(got, edit) || moved > 4 {
				t.Errorf("download of the edit: %d chunks", moved)
			}
			t.Logf("%d bytes, and an edit of it: %d bytes up, %d down, in %d of %d chunks; at rest %d, then %d", size, movedUp, down.down-size, moved, total, before, rest)
			for _, off := range []int64{size/2 - 1, size} {
				got, err := s.read(t, &bytestream.ReadRequest{ResourceName: "blobs/" + of(edit).String(), ReadOffset: off})
				if err != nil || !bytes.Equal(got, edit[off:]) {
					t.Errorf("read from %d: %d bytes, %v", off, len(got), err)
				}
			}
		})
	}
}

func protosOf(ds []digest.Digest) []*repb.Digest {
	ms := make([]*repb.Digest, len(ds))
	for i, d := range ds {
		ms[i] = d.Proto()
	}
	return ms
}

// TestChunks_large: the chunks of a blob of 100 GiB pass through messages of 4 MiB
// by the calls of 2.13, and are no answer to one of 2.12.
func TestChunks_large(t *testing.T) {
	for fn, n := range map[digest.Function]int{digest.SHA256: 200_000, digest.SHA512: 40_000} {
		f := newFakeChunker()
		s := startOver(t, f, rpc.Options{})
		d, ds := manyChunks(n, fn)
		f.say(blob.ChunkList{Function: blob.ChunkRepMaxCDC, Chunks: ds}, nil)
		got, chunks, pages, err := mapping(t, s, &repb.GetChunkMappingRequest{BlobDigest: d.Proto(), DigestFunction: fn.Proto()})
		if err != nil || got != repb.ChunkingFunction_REP_MAX_CDC || pages < 5 || len(chunks) != len(ds) {
			t.Fatalf("%s: %d chunks in %d messages, %v, %v", fn, len(chunks), pages, got, err)
		}
		for i, c := range chunks {
			if c.Hash != ds[i].Hash() || c.SizeBytes != ds[i].Size() {
				t.Fatalf("%s: chunk %d is %v, want %s", fn, i, c, ds[i])
			}
		}
		_, err = s.cas.SplitBlob(t.Context(), &repb.SplitBlobRequest{BlobDigest: d.Proto(), DigestFunction: fn.Proto()})
		wantCode(t, "SplitBlob", err, codes.NotFound)

		resp, err := register(t, s, registerRequests(d, repb.ChunkingFunction_FAST_CDC_2020, protosOf(ds), 20_000)...)
		if err != nil || resp.BlobDigest.Hash != d.Hash() || resp.BlobDigest.SizeBytes != d.Size() {
			t.Errorf("%s: %v, %v", fn, resp, err)
		}
		if f.of != d || f.spliced.Function != blob.ChunkFastCDC2020 || !slices.Equal(f.spliced.Chunks, ds) {
			t.Errorf("%s: the store got %d chunks of %s", fn, len(f.spliced.Chunks), f.of)
		}
	}
}

// TestSplit_codes has a row for each clause of the specification.
func TestSplit_codes(t *testing.T) {
	f := newFakeChunker()
	s := startOver(t, f, rpc.Options{})
	d, ds := manyChunks(3, digest.SHA256)
	list := blob.ChunkList{Function: blob.ChunkFastCDC2020, Chunks: ds}
	for _, c := range []struct {
		name     string
		d        *repb.Digest
		fn       repb.DigestFunction_Value
		err      error
		old, new codes.Code
	}{
		{"there", d.Proto(), repb.DigestFunction_SHA256, nil, codes.OK, codes.OK},
		{"function_inferred", d.Proto(), repb.DigestFunction_UNKNOWN, nil, codes.OK, codes.InvalidArgument},
		{"absent", d.Proto(), repb.DigestFunction_SHA256, fmt.Errorf("x: %w", blob.ErrNotFound), codes.NotFound, codes.NotFound},
		{"no_room", d.Proto(), repb.DigestFunction_SHA256, blob.ErrFull, codes.ResourceExhausted, codes.ResourceExhausted},
		{"corrupt_here", d.Proto(), repb.DigestFunction_SHA256, blob.ErrCorrupt, codes.Internal, codes.Internal},
		{"store_away", d.Proto(), repb.DigestFunction_SHA256, blob.ErrUnavailable, codes.Unavailable, codes.Unavailable},
		{"no_digest", nil, repb.DigestFunction_SHA256, nil, codes.InvalidArgument, codes.InvalidArgument},
		{"bad_hash", &repb.Digest{Hash: "xyz", SizeBytes: 1}, repb.DigestFunction_SHA256, nil, codes.InvalidArgument, codes.InvalidArgument},
		{"negative", &repb.Digest{Hash: d.Hash(), SizeBytes: -1}, repb.DigestFunction_SHA256, nil, codes.InvalidArgument, codes.InvalidArgument},
		{"unknown_function", d.Proto(), repb.DigestFunction_MURMUR3, nil, codes.InvalidArgument, codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.say(list, c.err)
			resp, err := s.cas.SplitBlob(t.Context(), &repb.SplitBlobRequest{BlobDigest: c.d, DigestFunction: c.fn})
			wantCode(t, "SplitBlob", err, c.old)
			if err == nil && (len(resp.ChunkDigests) != 3 || resp.ChunkingFunction != repb.ChunkingFunction_FAST_CDC_2020) {
				t.Errorf("SplitBlob: %v", resp)
			}
			_, chunks, _, err := mapping(t, s, &repb.GetChunkMappingRequest{BlobDigest: c.d, DigestFunction: c.fn})
			wantCode(t, "GetChunkMapping", err, c.new)
			if err == nil && len(chunks) != 3 {
				t.Errorf("GetChunkMapping: %d chunks", len(chunks))
			}
		})
	}
}

// TestSplit_preference: the client's is passed on, and what a later version of the
// API may bring is none.
func TestSplit_preference(t *testing.T) {
	f := newFakeChunker()
	s := startOver(t, f, rpc.Options{})
	d, ds := manyChunks(1, digest.SHA256)
	for _, c := range []struct {
		asked    repb.ChunkingFunction_Value
		prefer   blob.ChunkFunction
		answered repb.ChunkingFunction_Value
	}{
		{repb.ChunkingFunction_UNKNOWN, blob.ChunkUnknown, repb.ChunkingFunction_UNKNOWN},
		{repb.ChunkingFunction_FAST_CDC_2020, blob.ChunkFastCDC2020, repb.ChunkingFunction_FAST_CDC_2020},
		{repb.ChunkingFunction_REP_MAX_CDC, blob.ChunkRepMaxCDC, repb.ChunkingFunction_REP_MAX_CDC},
		{77, blob.ChunkUnknown, repb.ChunkingFunction_UNKNOWN},
	} {
		f.say(blob.ChunkList{Function: c.prefer, Chunks: ds}, nil)
		fn, _, _, err := mapping(t, s, &repb.GetChunkMappingRequest{BlobDigest: d.Proto(), DigestFunction: repb.DigestFunction_SHA256, ChunkingFunction: c.asked})
		if err != nil || f.prefer != c.prefer || fn != c.answered {
			t.Errorf("asked for %v: preference %v, answered %v, %v", c.asked, f.prefer, fn, err)
		}
	}
	// One message, with no chunks, for the empty blob.
	f.say(blob.ChunkList{}, nil)
	_, chunks, pages, err := mapping(t, s, &repb.GetChunkMappingRequest{BlobDigest: digest.Empty(digest.SHA256).Proto(), DigestFunction: repb.DigestFunction_SHA256})
	if err != nil || len(chunks) != 0 || pages != 1 {
		t.Errorf("the empty blob: %d chunks in %d messages, %v", len(chunks), pages, err)
	}
}

// TestChunks_capabilities: what is announced is what the store does.
func TestChunks_capabilities(t *testing.T) {
	f := newFakeChunker()
	s := startOver(t, f, rpc.Options{})
	got, err := s.capabilities.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	c := got.CacheCapabilities
	want := &repb.CacheCapabilities{
		SplitBlobSupport: true, SpliceBlobSupport: true,
		FastCdc_2020Params: &repb.FastCdc2020Params{AvgChunkSizeBytes: 4 << 10, Seed: 7},
		RepMaxCdcParams:    &repb.RepMaxCdcParams{MinChunkSizeBytes: 2 << 10, HorizonSizeBytes: 9 << 10},
	}
	if diff := cmp.Diff(want, &repb.CacheCapabilities{
		SplitBlobSupport: c.SplitBlobSupport, SpliceBlobSupport: c.SpliceBlobSupport,
		FastCdc_2020Params: c.FastCdc_2020Params, RepMaxCdcParams: c.RepMaxCdcParams,
	}, protocmp.Transform()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	// A decorator of a store that keeps no chunks.
	f.params = blob.ChunkParams{}
	if got, err = s.capabilities.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{}); err != nil || got.CacheCapabilities.SplitBlobSupport {
		t.Errorf("%v, %v; want no support", got, err)
	}
	_, err = register(t, s)
	wantCode(t, "an empty stream", err, codes.InvalidArgument)
	_, err = register(t, s, &repb.RegisterChunkMappingRequest{})
	wantCode(t, "RegisterChunkMapping", err, codes.Unimplemented)
	_, _, _, err = mapping(t, s, &repb.GetChunkMappingRequest{DigestFunction: repb.DigestFunction_SHA256})
	wantCode(t, "GetChunkMapping", err, codes.Unimplemented)
}

// TestChunks_instances: where instances are kept apart, chunks are too.
func TestChunks_instances(t *testing.T) {
	store := openChunked(t)
	apart, err := instances.New(t.Context(), store)
	if err != nil {
		t.Fatal(err)
	}
	s := startOver(t, store, rpc.Options{Stores: apart.Of})
	data := randomBlob(3 << 20)
	parts := [][]byte{data[:1<<20], data[1<<20:]}
	var chunks []*repb.Digest
	for _, part := range parts {
		if err := blob.ReceiveBytes(t.Context(), apart.Of("a"), of(part), part); err != nil {
			t.Fatal(err)
		}
		chunks = append(chunks, of(part).Proto())
	}
	d := of(data).Proto()
	splice := func(instance string) error {
		_, err := s.cas.SpliceBlob(t.Context(), &repb.SpliceBlobRequest{InstanceName: instance, BlobDigest: d, ChunkDigests: chunks})
		return err
	}
	wantCode(t, "splice where the chunks are not", splice("b"), codes.NotFound)
	wantCode(t, "splice", splice("a"), codes.OK)
	for instance, want := range map[string]codes.Code{"a": codes.OK, "b": codes.NotFound, "": codes.NotFound} {
		resp, err := s.cas.SplitBlob(t.Context(), &repb.SplitBlobRequest{InstanceName: instance, BlobDigest: d})
		wantCode(t, "split in "+instance, err, want)
		missing, ferr := s.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{InstanceName: instance, BlobDigests: append(resp.GetChunkDigests(), d)})
		if ferr != nil || (len(missing.MissingBlobDigests) > 0) != (want != codes.OK) {
			t.Errorf("in %q: missing %v, %v", instance, missing, ferr)
		}
	}
	if got, err := s.read(t, &bytestream.ReadRequest{ResourceName: "a/blobs/" + of(data).String()}); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read: %d bytes, %v", len(got), err)
	}
}
