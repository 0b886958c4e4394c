package rpc_test

import (
	"bytes"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"

	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/rpc"
)

// startChunked starts a server over chunks in files.
func startChunked(tb testing.TB, o rpc.Options) (*server, *chunked.Local) {
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
	return startOver(tb, store, o), store
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
	for _, fn := range []repb.ChunkingFunction_Value{repb.ChunkingFunction_FAST_CDC_2020, repb.ChunkingFunction_REP_MAX_CDC} {
		for _, newCalls := range []bool{false, true} {
			name := fn.String() + map[bool]string{false: "/2.12", true: "/2.13"}[newCalls]
			t.Run(name, func(t *testing.T) {
				s, store := startChunked(t, rpc.Options{})
				up, down := newChunkClient(t, s, fn, newCalls), newChunkClient(t, s, fn, newCalls)
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
				for _, off := range []int64{0, 1, size / 2, size} {
					got, err := s.read(t, &bytestream.ReadRequest{ResourceName: "blobs/" + of(edit).String(), ReadOffset: off})
					if err != nil || !bytes.Equal(got, edit[off:]) {
						t.Errorf("read from %d: %d bytes, %v", off, len(got), err)
					}
				}
			})
		}
	}
}
