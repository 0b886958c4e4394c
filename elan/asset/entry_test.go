package asset_test

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

// forgetful is a store that can lose blobs.
type forgetful struct {
	*mem.Store
	gone map[digest.Digest]bool
	err  error // of FindMissing, if it is set
}

func (f *forgetful) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	if f.err != nil {
		return nil, f.err
	}
	missing, err := f.Store.FindMissing(ctx, ds)
	for _, d := range ds {
		if f.gone[d] {
			missing = append(missing, d)
		}
	}
	return missing, err
}

func newForgetful(t *testing.T) (*forgetful, asset.Options) {
	f := &forgetful{Store: newStore(t), gone: map[digest.Digest]bool{}}
	return f, asset.Options{Store: f, Entries: f.Store}
}

func put(t testing.TB, s blob.Creator, data string) digest.Digest {
	t.Helper()
	d, err := blob.PutBytes(t.Context(), s, digest.SHA256, []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestFetchBlob_knows(t *testing.T) {
	content := "one"
	o := newSite(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(content)) })
	s, opts := newForgetful(t)
	a := newService(t, nil, opts)
	n := 0
	// step fetches, and tells whether the origin was asked.
	step := func(what string, r asset.Request, want string, asked bool) asset.Response {
		t.Helper()
		got := wantBlob(t, a, s, r, want)
		if now := len(o.requests()); now-n != map[bool]int{true: 1}[asked] {
			t.Errorf("%s: %d requests, asked should be %v", what, now-n, asked)
		}
		n = len(o.requests())
		return got
	}
	u := o.URL + "/a"
	start := time.Now()
	step("the first time", request(u), "one", true)
	content = "two"
	step("again", request(u), "one", false)
	step("another URI", request(o.URL+"/b"), "two", true)
	step("another function", asset.Request{URIs: []string{u}, Function: digest.BLAKE3}, "two", true)
	step("another instance", asset.Request{URIs: []string{u}, Instance: "other"}, "two", true)
	step("another type", request(u, "resource_type", "text/plain"), "two", true)
	step("with headers", request(u, "http_header:Authorization", "secret 1"), "two", true)
	content = "three"
	step("with the same", request(u, "http_header:Authorization", "secret 1"), "two", false)
	step("with others", request(u, "http_header:Authorization", "secret 2"), "three", true)
	step("for another purpose", request(u, "bazel.canonical_id", "x"), "three", true)

	old := request(u)
	old.Oldest = start
	step("not older than the first fetch", old, "one", false)
	old.Oldest = time.Now().Add(time.Hour)
	step("nothing old, with clocks that differ", old, "three", true)
	step("the same request again", old, "three", false)
	old.Oldest = old.Oldest.Add(time.Second)
	step("a later one", old, "three", true)

	sum := sri("three")
	step("what a checksum says is known, wherever it came from", request(o.URL+"/c", "checksum.sri", sum), "three", false)
	got := step("and whoever asks", request(o.URL+"/c", "checksum.sri", sum, "http_header:Authorization", "secret 3"), "three", false)
	if got.URI != "" {
		t.Errorf("from %s, want from nowhere", got.URI)
	}
	step("but not for another purpose", request(o.URL+"/c", "checksum.sri", sum, "bazel.canonical_id", "c"), "three", true)
	step("with it again, under another URI", request(o.URL+"/d", "checksum.sri", sum, "bazel.canonical_id", "c"), "three", false)
	step("nor where it has to be new", asset.Request{URIs: []string{o.URL + "/e"}, Qualifiers: qualifiers("checksum.sri", sum), Oldest: time.Now()}, "three", true)
	step("in any spelling", request(o.URL+"/f", "checksum.sri", "sha256-"+of("three").Hash()), "three", false)

	s.gone[of("three")] = true
	step("what is gone is fetched again", request(o.URL+"/c", "checksum.sri", sum), "three", true)
	s.err = blob.ErrUnavailable
	if _, err := a.FetchBlob(t.Context(), request(u)); !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("a store that can't tell: %v, want ErrUnavailable", err)
	}
}

// TestFetchBlob_damagedEntry: an entry that can't be read is none.
func TestFetchBlob_damagedEntry(t *testing.T) {
	o := newSite(t, serving("hello"))
	s := newStore(t)
	e := &brokenEntries{Entries: s}
	a := newService(t, nil, asset.Options{Store: s, Entries: e})
	wantBlob(t, a, s, request(o.URL), "hello")
	for _, bad := range []string{"", "x", "\x00asset 1\n", "\x00asset 1\n{}", "\x00asset 1\n{\"digest\":\"x\"}", "\x00asset 1\nnull", "\x00asset 1\n{\"digest\":\"blake3/" + of("x").String() + "\"}"} {
		e.value = &bad
		n := len(o.requests())
		wantBlob(t, a, s, request(o.URL), "hello")
		if len(o.requests()) != n+1 {
			t.Errorf("%q was served", bad)
		}
	}
	e.value, e.err = nil, blob.ErrUnavailable
	if _, err := a.FetchBlob(t.Context(), request(o.URL)); !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("entries that can't be read: %v, want ErrUnavailable", err)
	}
}

// brokenEntries gives out what it is told to.
type brokenEntries struct {
	blob.Entries
	value *string
	err   error
}

func (b *brokenEntries) Entry(ctx context.Context, k blob.EntryKey) ([]byte, error) {
	if !strings.HasPrefix(k.Instance, "blobs/") {
		return nil, errors.New("entries where action results are")
	}
	switch {
	case b.err != nil:
		return nil, b.err
	case b.value != nil:
		return []byte(*b.value), nil
	}
	return b.Entries.Entry(ctx, k)
}

func TestPushBlob(t *testing.T) {
	s, opts := newForgetful(t)
	a := newService(t, nil, opts)
	d, ref := put(t, s, "hello"), put(t, s, "referred to")
	qs := []string{"resource_type", "text/plain", "org.example.anything", "x"}
	p := asset.Push{URIs: []string{"urn:uuid:1", "https://example.com/a"}, Qualifiers: qualifiers(qs...), Digest: d, Blobs: []digest.Digest{ref}}
	if err := a.PushBlob(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	for _, u := range p.URIs {
		got := wantBlob(t, a, s, request(u, "org.example.anything", "x", "resource_type", "text/plain"), "hello")
		if got.URI != u || qualifier(got.Qualifiers, "org.example.anything") != "x" {
			t.Errorf("%+v", got)
		}
	}
	_, err := a.FetchBlob(t.Context(), request("urn:uuid:1"))
	wantReason(t, err, asset.NotFound, "not pushed")
	_, err = a.FetchBlob(t.Context(), request("urn:uuid:1", "org.example.anything", "y"))
	wantReason(t, err, asset.NotFound, "not pushed")
	_, err = a.FetchDirectory(t.Context(), request("urn:uuid:1", qs...))
	wantReason(t, err, asset.NotFound)
	if _, err = a.FetchBlob(t.Context(), request("https://example.com/a", "org.example.anything", "y")); !errors.Is(err, asset.ErrInvalid) {
		t.Errorf("a URL with a qualifier that nobody pushed: %v, want ErrInvalid", err)
	}
	// It is not served without what it refers to.
	s.gone[ref] = true
	_, err = a.FetchBlob(t.Context(), request("urn:uuid:1", qs...))
	wantReason(t, err, asset.NotFound)
	s.gone[ref] = false
	// A later push replaces it.
	p.Digest = put(t, s, "new")
	if err := a.PushBlob(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, a, s, request("urn:uuid:1", qs...), "new")

	for _, tc := range []struct {
		name string
		p    asset.Push
		want error
	}{
		{"no URI", asset.Push{Digest: d}, asset.ErrInvalid},
		{"no digest", asset.Push{URIs: []string{"urn:x"}}, asset.ErrInvalid},
		{"a missing blob", asset.Push{URIs: []string{"urn:x"}, Digest: of("nowhere")}, blob.ErrNotFound},
		{"a missing reference", asset.Push{URIs: []string{"urn:x"}, Digest: d, Blobs: []digest.Digest{of("nowhere")}}, blob.ErrNotFound},
		{"a missing directory", asset.Push{URIs: []string{"urn:x"}, Digest: d, Directories: []digest.Digest{of("nowhere")}}, blob.ErrNotFound},
		{"a wrong checksum", asset.Push{URIs: []string{"urn:x"}, Digest: d, Qualifiers: qualifiers("checksum.sri", sri("other"))}, asset.ErrInvalid},
		{"a bad checksum", asset.Push{URIs: []string{"urn:x"}, Digest: d, Qualifiers: qualifiers("checksum.sri", "x")}, asset.ErrInvalid},
		{"too many references", asset.Push{URIs: []string{"urn:x"}, Digest: d, Blobs: make([]digest.Digest, 10_001)}, asset.ErrInvalid},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := a.PushBlob(t.Context(), tc.p)
			if !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
			if _, ok := errors.AsType[*blob.MissingError](err); ok != errors.Is(tc.want, blob.ErrNotFound) {
				t.Errorf("%v: a MissingError %v", err, ok)
			}
		})
	}
}

// TestPushBlob_checksum: what was compared with a checksum is found by it.
func TestPushBlob_checksum(t *testing.T) {
	s := newStore(t)
	a := newService(t, s, asset.Options{})
	d, err := blob.PutBytes(t.Context(), s, digest.BLAKE3, []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.PushBlob(t.Context(), asset.Push{URIs: []string{"urn:a"}, Digest: d, Qualifiers: qualifiers("checksum.sri", sri("hello"))}); err != nil {
		t.Fatal(err)
	}
	r := request("urn:b", "checksum.sri", sri("hello"))
	r.Function = digest.BLAKE3
	if got := wantBlob(t, a, s, r, "hello"); got.Digest != d {
		t.Errorf("%s, want %s", got.Digest, d)
	}
}

func TestPush_expires(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t)
		a, err := asset.New(asset.Options{Store: s, Entries: s, Dir: dir, MinLifetime: 3 * time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		p := asset.Push{URIs: []string{"urn:a"}, Digest: put(t, s, "hello"), ExpireAt: time.Now().Add(time.Hour)}
		if err := a.PushBlob(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		if got := wantBlob(t, a, s, request("urn:a"), "hello"); !got.ExpiresAt.Equal(p.ExpireAt) {
			t.Errorf("expires at %v, want %v", got.ExpiresAt, p.ExpireAt)
		}
		time.Sleep(time.Hour)
		_, err = a.FetchBlob(t.Context(), request("urn:a"))
		wantReason(t, err, asset.NotFound)
		// It can be prolonged.
		p.ExpireAt = time.Now().Add(10 * time.Hour)
		if err := a.PushBlob(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		if got := wantBlob(t, a, s, request("urn:a"), "hello"); !got.ExpiresAt.Equal(time.Now().Add(3 * time.Hour)) {
			t.Errorf("expires at %v, want the store's lifetime from now", got.ExpiresAt)
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestPushDirectory(t *testing.T) {
	s, opts := newForgetful(t)
	a := newService(t, nil, opts)
	file := put(t, s, "hello")
	sub, err := blob.PutMessage(t.Context(), s, digest.SHA256, &repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: file.Proto()}}})
	if err != nil {
		t.Fatal(err)
	}
	root, err := blob.PutMessage(t.Context(), s, digest.SHA256, &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "d", Digest: sub.Proto()}}})
	if err != nil {
		t.Fatal(err)
	}
	p := asset.Push{URIs: []string{"urn:fdc:example:1"}, Digest: root, Directories: []digest.Digest{sub}}
	if err := a.PushDirectory(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	wantDirectory(t, a, s, request("urn:fdc:example:1"), "d/", "d/f=hello")
	// A checksum is that of an archive, with which nobody can compare a directory.
	checked := p
	checked.Qualifiers = qualifiers("checksum.sri", sri("an archive"))
	if _, ok := errors.AsType[*asset.UnsupportedError](a.PushDirectory(t.Context(), checked)); !ok {
		t.Error("a directory was pushed with a checksum")
	}
	// Whatever is missing of it, it is not served.
	s.gone[file] = true
	_, err = a.FetchDirectory(t.Context(), request("urn:fdc:example:1"))
	wantReason(t, err, asset.NotFound)
	if err := a.PushDirectory(t.Context(), p); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("push again: %v, want a missing blob", err)
	}
	s.gone[file] = false
	for _, empty := range []string{"urn:empty"} {
		if err := a.PushDirectory(t.Context(), asset.Push{URIs: []string{empty}, Digest: digest.Empty(digest.SHA256)}); err != nil {
			t.Error(err)
		}
		wantDirectory(t, a, s, request(empty), "")
	}
	if err := a.PushDirectory(t.Context(), asset.Push{URIs: []string{"urn:x"}, Digest: put(t, s, "\xff\xff")}); err == nil {
		t.Error("what is no Directory was taken")
	}
}

// TestNew_empties: what a killed server left in the spool is removed.
func TestNew_empties(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "git-1", "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file-1"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	newService(t, nil, asset.Options{Dir: dir}) // looks at the end
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
