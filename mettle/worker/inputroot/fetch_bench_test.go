//go:build linux

package inputroot_test

import (
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

// BenchmarkColdRoot builds an input root of 1,000 files that a cache does not have,
// from a server whose calls take 2 ms and more, without batches and with them in
// turn. The figures are medians.
func BenchmarkColdRoot(b *testing.B) {
	n := newNetwork(b, rpc.Options{})
	n.delay = 2 * time.Millisecond
	root, _ := thousand(b, n.store)
	once := func(hide func(blob.Store) blob.Store) (cold, warm time.Duration) {
		f := newFixture(b, hide(n.cached(b)), inputroot.Options{Policy: inputroot.Link})
		start := time.Now()
		if _, err := f.build(b, root.Proto()); err != nil {
			b.Fatal(err)
		}
		cold = time.Since(start)
		if err := inputroot.Remove(f.dir); err != nil {
			b.Fatal(err)
		}
		start = time.Now()
		if _, err := f.build(b, root.Proto()); err != nil {
			b.Fatal(err)
		}
		return cold, time.Since(start)
	}
	took := map[string][]time.Duration{}
	for b.Loop() {
		cold, warm := once(withoutFetch)
		took["one-by-one-ms"], took["one-by-one-warm-ms"] = append(took["one-by-one-ms"], cold), append(took["one-by-one-warm-ms"], warm)
		cold, warm = once(func(s blob.Store) blob.Store { return s })
		took["batches-ms"], took["batches-warm-ms"] = append(took["batches-ms"], cold), append(took["batches-warm-ms"], warm)
	}
	for name, t := range took {
		slices.Sort(t)
		b.ReportMetric(float64(t[len(t)/2].Microseconds())/1000, name)
	}
}

// BenchmarkDirectories reads the 56 Directories of that input root by batches, a
// level at a time, and by one GetTree, of which nothing is verified or kept, and which
// sends also what a worker has. The figures are medians.
func BenchmarkDirectories(b *testing.B) {
	n := newNetwork(b, rpc.Options{})
	n.delay = 2 * time.Millisecond
	root, _ := thousand(b, n.store)
	took := map[string][]time.Duration{}
	for b.Loop() {
		f := n.cached(b).(blob.Fetcher)
		start := time.Now()
		for level := []digest.Digest{root}; len(level) > 0; {
			if _, err := f.Fetch(b.Context(), level); err != nil {
				b.Fatal(err)
			}
			var next []digest.Digest
			for _, d := range level {
				m := &repb.Directory{}
				if err := blob.ReadMessage(b.Context(), f.(blob.Store), d, 1<<20, m); err != nil {
					b.Fatal(err)
				}
				for _, c := range m.Directories {
					d, err := digest.FromProto(digest.SHA256, c.Digest)
					if err != nil {
						b.Fatal(err)
					}
					next = append(next, d)
				}
			}
			level = next
		}
		took["levels-ms"] = append(took["levels-ms"], time.Since(start))

		start = time.Now()
		stream, err := repb.NewContentAddressableStorageClient(n.conn).GetTree(b.Context(), &repb.GetTreeRequest{RootDigest: root.Proto()})
		if err != nil {
			b.Fatal(err)
		}
		got := 0
		for {
			page, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				b.Fatal(err)
			}
			got += len(page.Directories)
		}
		if got != 56 {
			b.Fatalf("GetTree gave %d Directories", got)
		}
		took["GetTree-ms"] = append(took["GetTree-ms"], time.Since(start))
	}
	for name, t := range took {
		slices.Sort(t)
		b.ReportMetric(float64(t[len(t)/2].Microseconds())/1000, name)
	}
}
