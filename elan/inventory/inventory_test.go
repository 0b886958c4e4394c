package inventory_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/inventory"
	"github.com/mettle-build/mettle/elan/inventory/inventorytest"
)

func newLocal(t testing.TB, s blob.Store, e blob.Entries) inventory.Inventory {
	t.Helper()
	l, err := inventory.NewLocal(inventory.Options{Store: s, Entries: e})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLocal(t *testing.T) { inventorytest.Run(t, newLocal) }

// listing is a store that lists, and can't tell of single blobs.
type listing struct {
	blob.Store
	blob.Lister
}

func newMem(t testing.TB) *mem.Store {
	t.Helper()
	s, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStat_by_listing(t *testing.T) {
	s := newMem(t)
	var ds []digest.Digest
	for _, text := range []string{"a", "b", "c"} {
		d, err := blob.PutBytes(t.Context(), s, digest.SHA256, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		ds = append(ds, d)
	}
	absent := digest.Of(digest.SHA256, []byte("absent"))
	infos, err := newLocal(t, listing{Store: s, Lister: s}, nil).Stat(t.Context(), []digest.Digest{ds[2], absent, ds[0]})
	if err != nil || len(infos) != 2 || infos[0].Digest != ds[2] || infos[1].Digest != ds[0] {
		t.Errorf("%v, %v, want c and a", infos, err)
	}
}

// TestVerify_by_reading: a store that can't check itself is read.
func TestVerify_by_reading(t *testing.T) {
	s := newMem(t)
	good, err := blob.PutBytes(t.Context(), s, digest.SHA256, []byte("good"))
	if err != nil {
		t.Fatal(err)
	}
	bad := digest.Of(digest.SHA256, []byte("right"))
	w, err := s.Create(t.Context(), bad) // mem verifies nothing
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.Write([]byte("wrong")); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	var found []digest.Digest
	var last inventory.Progress
	for p, err := range newLocal(t, listing{Store: s, Lister: s}, nil).Verify(t.Context(), inventory.VerifyOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		if last = p; p.Finding != nil {
			found = append(found, p.Finding.Digest)
		}
	}
	if len(found) != 1 || found[0] != bad || last.Blobs != 2 {
		t.Errorf("found %v, want %s; %+v, want two blobs; %s is good", found, bad, last, good)
	}
}

func TestVerify_at_a_bounded_rate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMem(t)
		for i := range 10 {
			if _, err := blob.PutBytes(t.Context(), s, digest.SHA256, append(make([]byte, 999), byte(i))); err != nil {
				t.Fatal(err)
			}
		}
		start, told := time.Now(), 0
		for _, err := range newLocal(t, s, s).Verify(t.Context(), inventory.VerifyOptions{BytesPerSecond: 500}) {
			if err != nil {
				t.Fatal(err)
			}
			told++
		}
		// The last thousand bytes need not be waited for.
		if took := time.Since(start); took != 18*time.Second {
			t.Errorf("10,000 bytes at 500 a second took %v, want 18s", took)
		}
		if told != 10 { // after each but the first, two seconds apart, and at the end
			t.Errorf("it told %d times how far it is, want 10", told)
		}
	})
}

func TestUsage_By_ages_and_sizes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMem(t)
		for _, age := range []time.Duration{40 * 24 * time.Hour, 25 * time.Hour, 2 * time.Hour, time.Minute} {
			if _, err := blob.PutBytes(t.Context(), s, digest.SHA256, []byte(age.String())); err != nil {
				t.Fatal(err)
			}
			time.Sleep(age)
		}
		u, err := newLocal(t, s, s).Usage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var got []time.Duration
		for _, r := range u.By(func(c inventory.Class) inventory.Class { return inventory.Class{FromAge: c.FromAge} }) {
			got = append(got, r.FromAge)
		}
		// Each is older than it was by what followed.
		want := []time.Duration{0, time.Hour, 24 * time.Hour, 30 * 24 * time.Hour}
		if len(got) != len(want) {
			t.Fatalf("ages %v, want %v", got, want)
		}
		for i := range want {
			if got[i] != want[i] {
				t.Errorf("ages %v, want %v", got, want)
			}
		}
		all := u.By(func(inventory.Class) inventory.Class { return inventory.Class{} })
		if len(all) != 1 || all[0].Count != 4 {
			t.Errorf("all together: %+v", all)
		}
	})
}
