package tiered_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/blob/tiered"
	"github.com/mettle-build/mettle/elan/digest"
)

func wantFile(t testing.TB, path string, data []byte, perm fs.FileMode) {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Error(err)
		return
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, data) || st.Mode() != perm {
		t.Errorf("%s: mode %v, %d bytes, error %v", path, st.Mode(), len(got), err)
	}
}

func TestLink(t *testing.T) {
	for name, size := range sizes() {
		for _, c := range []struct {
			name string
			max  int64 // of the tier
		}{{"fits", 0}, {"too_large_for_the_tier", 10}} {
			t.Run(name+"/"+c.name, func(t *testing.T) {
				v := newTwo(t, func(o *tiered.Options) {
					o.Tiers[0] = tiered.Tier{Name: "disk", Store: newFile(t), MaxBlobBytes: c.max}
				})
				l, ok := blob.As[blob.Linker](v.s)
				if !ok {
					t.Fatal("a tier links, and the store does not")
				}
				data, dir := blobtest.Random(1, size), t.TempDir()
				d := put(t, v.low, data)
				for i, mode := range []blob.LinkMode{blob.LinkRegular, blob.LinkExecutable, blob.LinkRegular} {
					dst := filepath.Join(dir, string(rune('a'+i)))
					if err := l.Link(t.Context(), d, dst, mode); err != nil {
						t.Fatal(err)
					}
					wantFile(t, dst, data, map[blob.LinkMode]fs.FileMode{blob.LinkRegular: 0o444, blob.LinkExecutable: 0o555}[mode])
				}
				if n := v.low.count(blobtest.OpOpen); c.max == 0 && n != 1 {
					t.Errorf("the authority was read %d times for three links, want once", n)
				}
				err := l.Link(t.Context(), d, filepath.Join(dir, "a"), blob.LinkRegular)
				if !errors.Is(err, fs.ErrExist) {
					t.Errorf("link to a name that is taken: %v, want ErrExist", err)
				}
				wantFile(t, filepath.Join(dir, "a"), data, 0o444)
				gone := filepath.Join(dir, "gone")
				if err := l.Link(t.Context(), digest.Of(digest.SHA256, []byte("absent")), gone, blob.LinkRegular); !errors.Is(err, blob.ErrNotFound) {
					t.Errorf("link what is not there: %v, want ErrNotFound", err)
				}
			})
		}
	}
}

// What is adopted is in the authority when Adopt returns, or Adopt fails.
func TestAdopt(t *testing.T) {
	for name, size := range sizes() {
		t.Run(name, func(t *testing.T) {
			v := newTwo(t, func(o *tiered.Options) { o.Tiers[0] = tiered.Tier{Name: "disk", Store: newFile(t)} })
			a, ok := blob.As[blob.Adopter](v.s)
			if !ok {
				t.Fatal("a tier adopts, and the store does not")
			}
			data := blobtest.Random(1, size)
			adopt := func() (digest.Digest, error) {
				path := filepath.Join(t.TempDir(), "f")
				if err := os.WriteFile(path, data, 0o600); err != nil {
					t.Fatal(err)
				}
				f, err := os.Open(path)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				return a.Adopt(t.Context(), digest.SHA256, f)
			}
			for _, op := range []blobtest.Op{blobtest.OpCreate, blobtest.OpCommit} {
				v.low.fail(blob.ErrUnavailable, op)
				if d, err := adopt(); !errors.Is(err, blob.ErrUnavailable) {
					t.Errorf("adopted %s, error %v, want that of the authority", d, err)
				}
			}
			v.low.fail(nil)
			d, err := adopt()
			if err != nil || !has(t, v.low.Store, d) {
				t.Errorf("adopted %s, error %v; in the authority: %v", d, err, has(t, v.low.Store, d))
			}
			if _, err := adopt(); err != nil {
				t.Errorf("again: %v", err)
			}
		})
	}
}

// Who writes to a linked file loses the copy on the disk, and nothing else.
func TestAudit(t *testing.T) {
	v := newTwo(t, func(o *tiered.Options) { o.Tiers[0] = tiered.Tier{Name: "disk", Store: newFile(t)} })
	l, _ := blob.As[blob.Linker](v.s)
	a, ok := blob.As[blob.Auditor](v.s)
	if !ok {
		t.Fatal("a tier audits, and the store does not")
	}
	data, dst := blobtest.Random(1, 5000), filepath.Join(t.TempDir(), "f")
	d := put(t, v.s, data)
	if err := l.Link(t.Context(), d, dst, blob.LinkRegular); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dst, 0o644), os.WriteFile(dst, []byte("tampered"), 0)); err != nil {
		t.Fatal(err)
	}
	if err := a.Audit(t.Context(), d, blob.LinkRegular, time.Now()); !errors.Is(err, blob.ErrCorrupt) {
		t.Errorf("audit: %v, want ErrCorrupt", err)
	}
	wantRead(t, v.s, d, data)
	if !has(t, v.s, d) {
		t.Error("the blob is missing")
	}
}

// The abilities are those of the tiers, and no others.
func TestAbilities(t *testing.T) {
	m := func() blob.Store { return newMem(t, mem.Options{}) }
	bare := func() blob.Store { return struct{ blob.Store }{m()} }
	for _, c := range []struct {
		name           string
		up, low        blob.Store
		links, removes bool
	}{
		{"none", bare(), bare(), false, false},
		{"removes", bare(), m(), false, true},
		{"links", newFile(t), bare(), true, false},
		{"both", newFile(t), m(), true, true},
		{"below", m(), newFile(t), true, true},
	} {
		s := newTiered(t, tiered.Options{Tiers: []tiered.Tier{{Name: "up", Store: c.up}, {Name: "low", Store: c.low}}})
		_, links := blob.As[blob.Linker](s)
		_, adopts := blob.As[blob.Adopter](s)
		_, removes := blob.As[blob.Remover](s)
		if links != c.links || adopts != c.links || removes != c.removes {
			t.Errorf("%s: links %v, adopts %v, removes %v", c.name, links, adopts, removes)
		}
	}
}
