package blobtest

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// testSpaces: a blob is in the space in which it was put, and in no other; or the
// store says that it knows no spaces.
func testSpaces(t *testing.T, o Options) {
	s := o.New(t)
	if refusesSpaces(t, s) {
		return
	}
	data := Random(51, 10_000)
	for _, fn := range o.functions() {
		plain := digest.Of(fn, data)
		a, b := plain.In(digest.SpaceOf("a")), plain.In(digest.SpaceOf("b"))
		all := []digest.Digest{a, b, plain}
		for i, d := range all {
			for _, other := range all[i:] {
				wantAbsent(t, s, other)
			}
			missing, err := s.FindMissing(t.Context(), all)
			if err != nil || len(missing) != len(all)-i || missing[0] != d {
				t.Errorf("with %d of %v there: missing %v, %v", i, all, missing, err)
			}
			// Other bytes are refused in every space.
			if err := blob.Receive(t.Context(), s, d, bytes.NewReader(data[1:])); !errors.Is(err, blob.ErrCorrupt) {
				t.Errorf("receive other bytes as %s: %v, want ErrCorrupt", d, err)
			}
			if err := blob.Receive(t.Context(), s, d, bytes.NewReader(data)); err != nil {
				t.Errorf("receive %s: %v", d, err)
			}
			wantBlob(t, s, d, data)
		}
		if c, ok := blob.As[blob.Checker](s); ok {
			for _, d := range all {
				if err := c.Check(t.Context(), d); err != nil {
					t.Errorf("check %s: %v", d, err)
				}
				wantBlob(t, s, d, data)
			}
		}
		if r, ok := blob.As[blob.Remover](s); ok {
			if err := r.Remove(t.Context(), a); err != nil {
				t.Errorf("remove %s: %v", a, err)
			}
			wantAbsent(t, s, a)
			wantBlob(t, s, b, data)
			wantBlob(t, s, plain, data)
		}
	}
	empty := digest.Empty(digest.SHA256)
	wantBlob(t, s, empty.In(digest.SpaceOf("a")), nil)
	listSpaces(t, o)
	linkSpaces(t, o)
}

// refusesSpaces reports whether s knows no spaces, and sees to it that it says
// so at every call.
func refusesSpaces(t *testing.T, s blob.Store) bool {
	t.Helper()
	d := Put(t, s, digest.SHA256, []byte("shared")).In(digest.SpaceOf("a"))
	if _, err := s.FindMissing(t.Context(), []digest.Digest{d}); !errors.Is(err, errors.ErrUnsupported) {
		if err != nil {
			t.Fatalf("find a blob in a space: %v", err)
		}
		return false
	}
	if r, err := s.Open(t.Context(), d, 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Open: %v, %v; want ErrUnsupported, as of FindMissing", r, err)
	}
	if w, err := s.Create(t.Context(), d); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Create: %v, %v; want ErrUnsupported, as of FindMissing", w, err)
	}
	return true
}

// listSpaces: a listing tells the space, and its name for the blob can be read back.
func listSpaces(t *testing.T, o Options) {
	s := o.New(t)
	l, ok := blob.As[blob.Lister](s)
	if !ok {
		return
	}
	d := digest.Of(digest.SHA256, []byte("listed")).In(digest.SpaceOf("a"))
	if err := blob.Receive(t.Context(), s, d, bytes.NewReader([]byte("listed"))); err != nil {
		t.Fatal(err)
	}
	n := 0
	for info, err := range l.Blobs(t.Context()) {
		again, parseErr := digest.Parse(info.Digest.String())
		if err != nil || info.Digest != d || parseErr != nil || again != d {
			t.Errorf("listed %s, %v, read back as %s, %v; want %s", info.Digest, err, again, parseErr, d)
		}
		n++
	}
	if n != 1 {
		t.Errorf("%d blobs were listed, want 1", n)
	}
}

// linkSpaces: what only a store on the local disk can do, it does in spaces too.
func linkSpaces(t *testing.T, o Options) {
	s := o.New(t)
	l, links := blob.As[blob.Linker](s)
	a, adopts := blob.As[blob.SpaceAdopter](s)
	if !links || !adopts {
		return
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("adopted"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // opened for reading
	want := digest.Of(digest.SHA256, []byte("adopted")).In(digest.SpaceOf("a"))
	d, err := a.AdoptIn(t.Context(), digest.SpaceOf("a"), digest.SHA256, f)
	if err != nil || d != want {
		t.Fatalf("AdoptIn: %s, %v; want %s", d, err, want)
	}
	wantBlob(t, s, d, []byte("adopted"))
	wantAbsent(t, s, d.Plain())
	for _, mode := range []blob.LinkMode{blob.LinkRegular, blob.LinkExecutable} {
		to := filepath.Join(dir, string(rune('0'+mode)))
		if err := l.Link(t.Context(), d, to, mode); err != nil {
			t.Errorf("Link: %v", err)
		} else if got, err := os.ReadFile(to); err != nil || string(got) != "adopted" {
			t.Errorf("the linked file has %q, %v", got, err)
		}
		if err := l.Link(t.Context(), d.Plain(), to+"x", mode); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("Link of the blob in no space: %v, want ErrNotFound", err)
		}
	}
}
