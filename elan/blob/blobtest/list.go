package blobtest

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// testLister: each blob is listed once, and nothing else is.
func testLister(t *testing.T, o Options) {
	s := o.New(t)
	l, ok := blob.As[blob.Lister](s)
	if !ok {
		t.Skip("the store does not list blobs")
	}
	wantInfos(t, l, nil)
	if e, ok := s.(blob.Entries); ok {
		putEntry(t, e, blob.EntryKey{Action: digest.Of(digest.SHA256, []byte("an action"))}, []byte("not a blob"))
	}
	begun := time.Now()
	want := map[string]bool{}
	for _, fn := range o.functions() {
		for _, size := range []int{1, 5000, 100_000} {
			want[Put(t, s, fn, Random(uint64(size), size)).String()] = true
		}
	}
	for i := range 50 {
		want[Put(t, s, digest.SHA256, fmt.Appendf(nil, "blob %d", i)).String()] = true
	}
	wantInfos(t, l, want)
	for info, err := range l.Blobs(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		// A store may know a use to the second, or to the hour.
		if !info.LastUse.IsZero() && (info.LastUse.Before(begun.Add(-time.Hour)) || info.LastUse.After(time.Now().Add(time.Minute))) {
			t.Errorf("%s was last used at %v, want about %v", info.Digest, info.LastUse, begun)
		}
	}
	testListEnds(t, l.Blobs)
	if linker, ok := blob.As[blob.Linker](s); ok {
		for info, err := range l.Blobs(t.Context()) { // what is linked is no other blob
			if err != nil {
				t.Fatal(err)
			}
			if err := linker.Link(t.Context(), info.Digest, t.TempDir()+"/x", blob.LinkExecutable); err != nil {
				t.Error(err)
			}
			break
		}
		wantInfos(t, l, want)
	}
}

// wantInfos fails the test unless the blobs listed are those of want.
func wantInfos(t testing.TB, l blob.Lister, want map[string]bool) {
	t.Helper()
	got := map[string]bool{}
	for info, err := range l.Blobs(t.Context()) {
		name := info.Digest.String()
		switch {
		case err != nil:
			t.Errorf("list: %v", err)
		case got[name]:
			t.Errorf("%s is listed twice", name)
		case info.StoredBytes <= 0:
			t.Errorf("%s takes %d bytes", name, info.StoredBytes)
		}
		got[name] = true
	}
	if want == nil {
		want = map[string]bool{}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("blobs listed, -want +got:\n%s", diff)
	}
}

// testListEnds: a list of which there is more ends where its reader leaves, and
// where its context does.
func testListEnds[T any](t *testing.T, list func(ctx context.Context) iter.Seq2[T, error]) {
	t.Helper()
	n := 0
	for _, err := range list(t.Context()) {
		if err != nil {
			t.Errorf("list: %v", err)
		}
		if n++; n == 2 {
			break
		}
	}
	if n != 2 {
		t.Errorf("%d values before the reader left, want 2", n)
	}
	var last error
	n = 0
	for _, err := range list(cancelledContext(t)) {
		n++
		last = err
	}
	if n != 1 || !errors.Is(last, context.Canceled) {
		t.Errorf("cancelled: %d values, the last with error %v; want one with Canceled", n, last)
	}
}

func testRemover(t *testing.T, o Options) {
	s := o.New(t)
	r, ok := blob.As[blob.Remover](s)
	if !ok {
		t.Skip("the store removes no blobs")
	}
	large := Random(1, 300<<10)
	for _, data := range [][]byte{[]byte("small"), large} {
		d, other := digest.Of(digest.SHA256, data), Put(t, s, digest.SHA256, append([]byte("other"), data...))
		if err := r.Remove(t.Context(), d); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("remove what is not there: %v, want ErrNotFound", err)
		}
		for range 2 {
			Put(t, s, digest.SHA256, data)
			if linker, ok := blob.As[blob.Linker](s); ok {
				for _, mode := range []blob.LinkMode{blob.LinkRegular, blob.LinkExecutable} {
					if err := linker.Link(t.Context(), d, t.TempDir()+"/x", mode); err != nil {
						t.Error(err)
					}
				}
			}
			if err := r.Remove(cancelledContext(t), d); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled: %v", err)
			}
			wantBlob(t, s, d, data)
			if err := r.Remove(t.Context(), d); err != nil {
				t.Errorf("remove: %v", err)
			}
			wantAbsent(t, s, d)
			if err := r.Remove(t.Context(), d); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("remove again: %v, want ErrNotFound", err)
			}
		}
		wantBlob(t, s, other, append([]byte("other"), data...))
	}
	if err := r.Remove(t.Context(), digest.Digest{}); err == nil || errors.Is(err, blob.ErrNotFound) {
		t.Errorf("remove the zero digest: %v, want an error of the caller", err)
	}
}

// testEntryLister: each entry is listed once under its own key.
func testEntryLister(t *testing.T, o Options) {
	s := o.New(t)
	l, ok := blob.As[blob.EntryLister](s)
	if _, keeps := s.(blob.Entries); !ok || !keeps {
		t.Skip("the store does not list entries")
	}
	e := s.(blob.Entries)
	Put(t, s, digest.SHA256, []byte("not an entry"))
	want := map[string]int64{}
	for i, instance := range []string{"", "main", "a/b", "~", "..", "ünï code", "\x00", strings.Repeat("long", 45)} {
		for _, fn := range o.functions() {
			k := blob.EntryKey{Instance: instance, Action: digest.Of(fn, []byte("action"))}
			for _, size := range []int{i, 10 * i * i} { // the second replaces the first
				putEntry(t, e, k, Random(1, size))
				want[fmt.Sprintf("%q %s", k.Instance, k.Action)] = int64(size)
			}
		}
	}
	got := map[string]int64{}
	for info, err := range l.EntryInfos(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("%q %s", info.Key.Instance, info.Key.Action)
		if _, again := got[name]; again {
			t.Errorf("%s is listed twice", name)
		}
		got[name] = info.Bytes
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("sizes of the entries listed, -want +got:\n%s", diff)
	}
	testListEnds(t, l.EntryInfos)
}
