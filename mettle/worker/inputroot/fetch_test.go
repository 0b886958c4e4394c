//go:build linux

package inputroot_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/instances"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/blob/retry"
	"github.com/mettle-build/mettle/elan/blob/tiered"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

const away = "some/instance"

// network is an elan that is a call away, whose calls are counted, and can be made
// slow or wrong.
type network struct {
	store blob.Store // the server's
	conn  *grpc.ClientConn
	delay time.Duration
	spoil func(*repb.BatchReadBlobsResponse) // what came; nil: it is left alone
	// spoilTree changes what came of a tree.
	spoilTree func(*repb.GetTreeResponse) error

	mu    sync.Mutex
	calls map[string]int // by method
}

func newNetwork(t testing.TB, o rpc.Options) *network {
	t.Helper()
	store, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	n := &network{store: store, calls: map[string]int{}}
	if o.Actions, err = action.New(action.Options{Store: store, Entries: store}); err != nil {
		t.Fatal(err)
	}
	o.Store = store
	g := grpc.NewServer()
	if err := rpc.Register(g, o); err != nil {
		t.Fatal(err)
	}
	l := bufconn.Listen(1 << 20)
	done := make(chan error)
	go func() { done <- g.Serve(l) }()
	n.conn, err = grpc.NewClient("passthrough:bufconn",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(n.unary), grpc.WithStreamInterceptor(n.stream),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = n.conn.Close()
		g.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return n
}

func (n *network) call(method string) {
	n.mu.Lock()
	n.calls[method[strings.LastIndexByte(method, '/')+1:]]++
	n.mu.Unlock()
	time.Sleep(n.delay)
}

func (n *network) unary(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	n.call(method)
	err := invoke(ctx, method, req, reply, conn, opts...)
	if r, ok := reply.(*repb.BatchReadBlobsResponse); ok && n.spoil != nil {
		n.spoil(r)
	}
	return err
}

func (n *network) stream(ctx context.Context, d *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	n.call(method)
	s, err := open(ctx, d, conn, method, opts...)
	if err == nil && strings.HasSuffix(method, "/GetTree") && n.spoilTree != nil {
		s = spoiled{s, n.spoilTree}
	}
	return s, err
}

// counted are the calls since it was last asked.
func (n *network) counted() map[string]int {
	n.mu.Lock()
	defer n.mu.Unlock()
	defer func() { n.calls = map[string]int{} }()
	return n.calls
}

// cached is the network as a worker has it: with a directory in front.
func (n *network) cached(t testing.TB) blob.Store {
	t.Helper()
	s, stop := n.cachedIn(t, filepath.Join(t.TempDir(), "cache"))
	t.Cleanup(stop)
	return s
}

// cachedIn is cached with a directory that may have been there before, until stop.
func (n *network) cachedIn(t testing.TB, dir string) (s blob.Store, stop func()) {
	t.Helper()
	patient, err := retry.New(retry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	remote, err := client.NewInstances(client.Options{Conn: n.conn})
	if err != nil {
		t.Fatal(err)
	}
	remote.Of(away)
	cache, err := file.New(file.Options{Dir: dir, MinFreeBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	tiers, err := tiered.New(t.Context(), tiered.Options{
		Tiers: []tiered.Tier{{Name: "cache", Store: cache}, {Name: "storage", Store: patient.Store(remote)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return instances.Over(tiers).Of(away), func() { _, _ = tiers.Close(), cache.Close() }
}

// oneByOne is a store without blob.Fetcher.
type oneByOne struct {
	blob.Store
	blob.Linker
	blob.Auditor
}

func withoutFetch(s blob.Store) blob.Store {
	return oneByOne{s, s.(blob.Linker), s.(blob.Auditor)}
}

// thousand puts an input root of 1,000 small files in 50 directories, three
// levels deep, into a store.
func thousand(t testing.TB, s blob.Store) (root digest.Digest, files []digest.Digest) {
	t.Helper()
	put := func(dir *repb.Directory) *repb.Digest {
		d, err := blob.PutMessage(t.Context(), s, digest.SHA256, dir)
		if err != nil {
			t.Fatal(err)
		}
		return d.Proto()
	}
	top := &repb.Directory{}
	for i := range 5 {
		middle := &repb.Directory{}
		for j := range 10 {
			leaf := &repb.Directory{}
			for k := range 20 {
				d, err := blob.PutBytes(t.Context(), s, digest.SHA256, fmt.Appendf(nil, "%d %d %d %1000d", i, j, k, k))
				if err != nil {
					t.Fatal(err)
				}
				files = append(files, d)
				leaf.Files = append(leaf.Files, &repb.FileNode{Name: fmt.Sprintf("f%02d", k), Digest: d.Proto()})
			}
			middle.Directories = append(middle.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("d%d", j), Digest: put(leaf)})
		}
		top.Directories = append(top.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("d%d", i), Digest: put(middle)})
	}
	d, err := digest.FromProto(digest.SHA256, put(top))
	if err != nil {
		t.Fatal(err)
	}
	return d, files
}

// What travels one by one is a call each; together it is a few.
func TestBuild_calls(t *testing.T) {
	for _, tc := range []struct {
		name string
		hide func(blob.Store) blob.Store
		want map[string]int
	}{
		{name: "one by one", hide: withoutFetch, want: map[string]int{"Read": 1056}},
		{name: "batches", hide: func(s blob.Store) blob.Store { return s }, want: map[string]int{"GetCapabilities": 1, "BatchReadBlobs": 2, "GetTree": 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNetwork(t, rpc.Options{})
			root, _ := thousand(t, n.store)
			f := newFixture(t, tc.hide(n.cached(t)), inputroot.Options{Policy: inputroot.Link})
			if _, err := f.build(t, root.Proto()); err != nil {
				t.Fatal(err)
			}
			if got := n.counted(); !maps.Equal(got, tc.want) {
				t.Errorf("calls %v, want %v", got, tc.want)
			}
			got, err := os.ReadFile(filepath.Join(f.dir, "d4", "d9", "f19"))
			if want := fmt.Sprintf("4 9 19 %1000d", 19); err != nil || string(got) != want {
				t.Errorf("a file has %d bytes, %v, want %d", len(got), err, len(want))
			}
			// Again, with all at hand.
			if err := inputroot.Remove(f.dir); err != nil {
				t.Fatal(err)
			}
			if _, err := f.build(t, root.Proto()); err != nil {
				t.Fatal(err)
			}
			if got := n.counted(); len(got) > 0 {
				t.Errorf("calls for what is there: %v", got)
			}
		})
	}
}

// A server that takes little at once is asked more often, and by streams for what is
// more than that.
func TestBuild_small_batches(t *testing.T) {
	n := newNetwork(t, rpc.Options{MaxBatchBytes: 1500})
	f := newFixture(t, n.cached(t), inputroot.Options{Policy: inputroot.Link})
	dir := &repb.Directory{}
	for i, size := range []int{700, 700, 700, 700, 1500, 1501, 3 << 20} {
		d, err := blob.PutBytes(t.Context(), n.store, digest.SHA256, blobtest.Random(uint64(i), size))
		if err != nil {
			t.Fatal(err)
		}
		dir.Files = append(dir.Files, &repb.FileNode{Name: fmt.Sprint(i), Digest: d.Proto()})
	}
	root, err := blob.PutMessage(t.Context(), n.store, digest.SHA256, dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.build(t, root.Proto()); err != nil {
		t.Fatal(err)
	}
	// The Directory, 700 + 700 twice, and 1500; then 1501 and 3 MiB.
	if got, want := n.counted(), map[string]int{"GetCapabilities": 1, "BatchReadBlobs": 4, "Read": 2}; !maps.Equal(got, want) {
		t.Errorf("calls %v, want %v", got, want)
	}
}

func TestBuild_missing_in_a_batch(t *testing.T) {
	n := newNetwork(t, rpc.Options{})
	root, files := thousand(t, n.store)
	gone := []digest.Digest{files[3], files[700]}
	for _, d := range gone {
		if err := n.store.(blob.Remover).Remove(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	f := newFixture(t, n.cached(t), inputroot.Options{Policy: inputroot.Link})
	_, err := f.build(t, root.Proto())
	var missing *blob.MissingError
	if !errors.As(err, &missing) {
		t.Fatalf("error %v, want a MissingError", err)
	}
	byHash := func(a, b digest.Digest) int { return strings.Compare(a.Hash(), b.Hash()) }
	slices.SortFunc(missing.Digests, byHash)
	slices.SortFunc(gone, byHash)
	if !slices.Equal(missing.Digests, gone) {
		t.Errorf("missing %v, want %v", missing.Digests, gone)
	}
}

func TestBuild_corrupt_in_a_batch(t *testing.T) {
	for name, spoil := range map[string]func(*repb.BatchReadBlobsResponse_Response){
		"other bytes": func(r *repb.BatchReadBlobsResponse_Response) { r.Data[0] ^= 1 },
		"fewer bytes": func(r *repb.BatchReadBlobsResponse_Response) { r.Data = r.Data[1:] },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNetwork(t, rpc.Options{})
			root, files := thousand(t, n.store)
			n.spoil = func(resp *repb.BatchReadBlobsResponse) {
				for _, r := range resp.Responses {
					if r.Digest.Hash == files[500].Hash() {
						spoil(r)
					}
				}
			}
			cached := n.cached(t)
			f := newFixture(t, cached, inputroot.Options{Policy: inputroot.Link})
			if _, err := f.build(t, root.Proto()); !errors.Is(err, blob.ErrCorrupt) || !strings.Contains(err.Error(), files[500].Hash()) {
				t.Errorf("error %v, want ErrCorrupt and the blob's name", err)
			}
			// It was not kept: sound bytes are fetched once more.
			n.spoil = nil
			if err := inputroot.Remove(f.dir); err != nil {
				t.Fatal(err)
			}
			if _, err := f.build(t, root.Proto()); err != nil {
				t.Error(err)
			}
		})
	}
}

// Slots that want the same at the same time fetch it once.
func TestBuild_slots_together(t *testing.T) {
	n := newNetwork(t, rpc.Options{})
	root, _ := thousand(t, n.store)
	var mu sync.Mutex
	came := map[string]int{} // by hash
	n.spoil = func(resp *repb.BatchReadBlobsResponse) {
		mu.Lock()
		defer mu.Unlock()
		for _, r := range resp.Responses {
			came[r.Digest.Hash]++
		}
	}
	f := newFixture(t, n.cached(t), inputroot.Options{Policy: inputroot.Link})
	var slots errgroup.Group
	for i := range 4 {
		dir := fmt.Sprint(f.dir, i)
		t.Cleanup(func() { _ = inputroot.Remove(dir) })
		slots.Go(func() error {
			_, err := f.builder.Build(t.Context(), inputroot.Request{Dir: dir, Digest: root})
			return err
		})
	}
	if err := slots.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(came) != 1001 {
		t.Errorf("%d blobs came in batches, want the root and 1000 files", len(came))
	}
	if got := n.counted()["GetTree"]; got != 1 {
		t.Errorf("%d trees came, want 1", got)
	}
	for hash, times := range came {
		if times != 1 {
			t.Errorf("blob %s came %d times", hash, times)
		}
	}
}

// What a disk has changed in the cache while no worker ran is fetched again, and is in
// no input root; what is sound is not.
func TestBuild_corrupt_since_the_last_run(t *testing.T) {
	n := newNetwork(t, rpc.Options{})
	contents := map[string][]byte{"large": blobtest.Random(1, 100_000), "small": blobtest.Random(2, 500), "sound": blobtest.Random(3, 100_000)}
	dir := &repb.Directory{}
	for _, name := range slices.Sorted(maps.Keys(contents)) {
		d, err := blob.PutBytes(t.Context(), n.store, digest.SHA256, contents[name])
		if err != nil {
			t.Fatal(err)
		}
		dir.Files = append(dir.Files, &repb.FileNode{Name: name, Digest: d.Proto()})
	}
	root, err := blob.PutMessage(t.Context(), n.store, digest.SHA256, dir)
	if err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(t.TempDir(), "cache")
	for run := range 2 {
		store, stop := n.cachedIn(t, at)
		f := newFixture(t, store, inputroot.Options{Policy: inputroot.Link})
		if _, err := f.build(t, root.Proto()); err != nil {
			t.Fatal(err)
		}
		for name, want := range contents {
			if got, err := os.ReadFile(filepath.Join(f.dir, name)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("run %d: %s has wrong bytes, %v", run, name, err)
			}
		}
		stop()
		if run == 0 {
			n.counted()
			rot(t, filepath.Join(f.dir, "large"))
			rot(t, filepath.Join(f.dir, "small"))
		}
	}
	if got := n.counted(); got["Read"]+got["BatchReadBlobs"] != 1 {
		t.Errorf("calls %v, want one for the large blob", got)
	}
}

// rot changes a byte of a file as a failing disk does: nothing else of it changes.
func rot(t testing.TB, path string) {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := errors.Join(os.Chmod(path, 0o644), os.WriteFile(path, data, 0o600), os.Chmod(path, st.Mode()), os.Chtimes(path, time.Time{}, st.ModTime())); err != nil {
		t.Fatal(err)
	}
}
