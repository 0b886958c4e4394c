//go:build linux

package output_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/instances"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/blob/tiered"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker/output"
)

// batching is a store elsewhere that takes batches.
type batching struct {
	counting
	batches, blobs atomic.Int64
	fail           error
}

func (b *batching) WriteBatch(ctx context.Context, bs []blob.Bytes) error {
	if b.fail != nil {
		return b.fail
	}
	b.batches.Add(1)
	for _, x := range bs {
		b.blobs.Add(1)
		if err := blob.ReceiveBytes(ctx, b.Store, x.Digest, x.Data); err != nil {
			return err
		}
	}
	return nil
}

// behindCache is a store elsewhere, and the same with a directory in front, of one
// instance.
func behindCache(t testing.TB) (elsewhere *batching, cached blob.Store) {
	t.Helper()
	inner, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	elsewhere = &batching{counting: counting{Store: inner}}
	cache, err := file.New(file.Options{Dir: filepath.Join(t.TempDir(), "cache"), MinFreeBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cache.Close() })
	tiers, err := tiered.New(t.Context(), tiered.Options{
		Tiers: []tiered.Tier{{Name: "cache", Store: cache}, {Name: "elsewhere", Store: elsewhere}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tiers.Close() })
	return elsewhere, instances.Over(tiers).Of("i")
}

// Outputs go on together: what is small by one call, and with a question before if
// they are many bytes.
func TestCollect_passes_on_together(t *testing.T) {
	for _, tc := range []struct {
		name                           string
		files                          map[string]string
		batches, blobs, creates, finds int64
	}{
		{name: "one", files: map[string]string{"out/a": "a"}, batches: 1, blobs: 3},
		{name: "few", files: map[string]string{"out/a": "a", "out/b": "b", "out/same": "b"}, batches: 1, blobs: 4},
		{name: "five", files: many(5), batches: 1, blobs: 7},
		{name: "many", files: many(500), batches: 1, blobs: 502, finds: 1},
		{name: "thousand", files: many(1000), batches: 1, blobs: 1002, finds: 1},
		{name: "large", files: map[string]string{"out/a": "a", "out/l": strings.Repeat("l", 2<<20)}, batches: 1, blobs: 3, creates: 1, finds: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			elsewhere, cached := behindCache(t)
			f := newFixture(t, cached, output.Options{})
			f.write(t, tc.files)
			got := f.mustCollect(t, &repb.Command{OutputPaths: []string{"out"}})
			// The files, the Tree and, as a blob of its own, its root.
			type calls struct{ batches, blobs, creates, finds int64 }
			is := calls{elsewhere.batches.Load(), elsewhere.blobs.Load(), elsewhere.creates.Load(), elsewhere.finds.Load()}
			if want := (calls{tc.batches, tc.blobs, tc.creates, tc.finds}); is != want {
				t.Errorf("calls %+v, want %+v", is, want)
			}
			// All is there, for those who do not have this cache, in its instance.
			space := digest.SpaceOf("i")
			want := []digest.Digest{}
			for _, data := range tc.files {
				want = append(want, digest.Of(digest.SHA256, []byte(data)).In(space))
			}
			d, err := digest.FromProto(digest.SHA256, got.Result.OutputDirectories[0].TreeDigest)
			if err != nil {
				t.Fatal(err)
			}
			missing, err := elsewhere.Store.FindMissing(t.Context(), append(want, d.In(space)))
			if err != nil || len(missing) > 0 {
				t.Errorf("missing %v, %v", missing, err)
			}
			// What the store has already is not sent again, where it was asked.
			sent := elsewhere.blobs.Load()
			f.mustCollect(t, &repb.Command{OutputPaths: []string{"out"}})
			if again := elsewhere.blobs.Load() - sent; tc.finds > 0 && again > 0 {
				t.Errorf("%d blobs were sent again", again)
			}
		})
	}
}

func many(n int) map[string]string {
	files := map[string]string{}
	for i := range n {
		files[fmt.Sprintf("out/%03d", i)] = fmt.Sprintf("%1000d", i)
	}
	return files
}

// Outputs that the store does not take are no result.
func TestCollect_passing_on_fails(t *testing.T) {
	elsewhere, cached := behindCache(t)
	elsewhere.fail = blob.ErrFull
	f := newFixture(t, cached, output.Options{})
	f.write(t, map[string]string{"out/a": "a"})
	if got, err := f.collect(t, &repb.Command{OutputPaths: []string{"out"}}); !errors.Is(err, blob.ErrFull) {
		t.Errorf("collected %v, %v, want ErrFull", got, err)
	}
}

// More than may wait goes on before all is collected.
func TestCollect_waiting_is_bounded(t *testing.T) {
	elsewhere, cached := behindCache(t)
	f := newFixture(t, cached, output.Options{})
	files := map[string]string{}
	var paths []string
	for i := range 5000 {
		name := fmt.Sprintf("%04d", i)
		files[name] = name
		paths = append(paths, name)
	}
	f.write(t, files)
	slices.Sort(paths)
	f.mustCollect(t, &repb.Command{OutputPaths: paths})
	// 4,096 in batches of 1,024, and the rest.
	if got := elsewhere.batches.Load(); got != 5 || elsewhere.blobs.Load() != 5000 {
		t.Errorf("%d batches of %d blobs, want 5 of 5000", got, elsewhere.blobs.Load())
	}
}
