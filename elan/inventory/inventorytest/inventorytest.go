// Package inventorytest is what every inventory.Inventory has to do, whether the
// store is here or behind a server. Only tests import it.
package inventorytest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/inventory"
)

// Store is the store that an Inventory is of: one in memory, some blobs of which
// are damaged.
type Store struct {
	*mem.Store
	Damaged map[digest.Digest]error // what a Check of them returns
}

// Check implements blob.Checker.
func (s *Store) Check(ctx context.Context, d digest.Digest) error {
	if err := s.Damaged[d]; err != nil {
		return fmt.Errorf("check blob %s: %w", d, err)
	}
	return s.Store.Check(ctx, d)
}

// bare hides the abilities of a store.
type bare struct {
	blob.Store
	blob.Entries
}

// Run tests the Inventories that make makes. What they need to end, it leaves to
// t.Cleanup.
func Run(t *testing.T, newInventory func(t testing.TB, s blob.Store, e blob.Entries) inventory.Inventory) {
	t.Helper()
	start := func(t *testing.T) (*Store, inventory.Inventory) {
		m, err := mem.New(mem.Options{})
		if err != nil {
			t.Fatal(err)
		}
		s := &Store{Store: m, Damaged: map[digest.Digest]error{}}
		return s, newInventory(t, s, s)
	}
	t.Run("list", func(t *testing.T) { testList(t, start) })
	t.Run("stat", func(t *testing.T) { testStat(t, start) })
	t.Run("remove", func(t *testing.T) { testRemove(t, start) })
	t.Run("usage", func(t *testing.T) { testUsage(t, start) })
	t.Run("verify", func(t *testing.T) { testVerify(t, start) })
	t.Run("unsupported", func(t *testing.T) {
		s, _ := start(t)
		testUnsupported(t, newInventory(t, bare{Store: s.Store}, bare{Entries: s.Store}))
	})
}

type starter = func(t *testing.T) (*Store, inventory.Inventory)

func put(t *testing.T, s *Store, fn digest.Function, data string) digest.Digest {
	t.Helper()
	d, err := blob.PutBytes(t.Context(), s, fn, []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func putEntry(t *testing.T, s *Store, instance, action string) blob.EntryKey {
	t.Helper()
	k := blob.EntryKey{Instance: instance, Action: digest.Of(digest.SHA256, []byte(action))}
	if err := s.PutEntry(t.Context(), k, []byte("value of "+action)); err != nil {
		t.Fatal(err)
	}
	return k
}

// gather is all of an enumeration as sorted texts.
func gather[T any](t *testing.T, all iter.Seq2[T, error], text func(T) string) []string {
	t.Helper()
	var got []string
	for i, err := range all {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, text(i))
	}
	slices.Sort(got)
	return got
}

// first is the error that comes with the first of all.
func first[T any](all iter.Seq2[T, error]) (err error) {
	for _, err = range all {
		break
	}
	return err
}

func blobText(i blob.Info) string { return i.Digest.String() }

func entryText(i blob.EntryInfo) string { return i.Key.Instance + " " + i.Key.Action.String() }

func testList(t *testing.T, start starter) {
	s, inv := start(t)
	if got := gather(t, inv.Blobs(t.Context(), inventory.Filter{}), blobText); got != nil {
		t.Errorf("an empty store has %v", got)
	}
	before := time.Now()
	small, large, other := put(t, s, digest.SHA256, "small"), put(t, s, digest.SHA256, string(make([]byte, 5000))), put(t, s, digest.BLAKE3, "other")
	entry, elsewhere := putEntry(t, s, "", "action"), putEntry(t, s, "in/stance", "another")
	after := time.Now().Add(time.Second)
	instance, unnamed := "in/stance", ""
	sorted := func(ds ...digest.Digest) (texts []string) {
		for _, d := range ds {
			texts = append(texts, d.String())
		}
		slices.Sort(texts)
		return texts
	}
	for _, tc := range []struct {
		name    string
		filter  inventory.Filter
		blobs   []string
		entries []string
	}{
		{"all", inventory.Filter{}, sorted(small, large, other), []string{" " + entry.Action.String(), "in/stance " + elsewhere.Action.String()}},
		{"a function", inventory.Filter{Function: digest.BLAKE3}, sorted(other), nil},
		{"large ones", inventory.Filter{MinBytes: 1000}, sorted(large), nil},
		{"small ones", inventory.Filter{MaxBytes: 15, Function: digest.SHA256}, sorted(small), []string{" " + entry.Action.String()}},
		{"old ones", inventory.Filter{UsedBefore: before}, nil, nil},
		{"new ones", inventory.Filter{UsedSince: after}, nil, nil},
		{"used between", inventory.Filter{UsedSince: before.Add(-time.Second), UsedBefore: after, MinBytes: 1000}, sorted(large), nil},
		{"an instance", inventory.Filter{Instance: &instance, MaxBytes: 5000}, sorted(small, large, other), []string{"in/stance " + elsewhere.Action.String()}},
		{"the unnamed instance", inventory.Filter{Instance: &unnamed, MinBytes: 10}, sorted(large), []string{" " + entry.Action.String()}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.blobs, gather(t, inv.Blobs(t.Context(), tc.filter), blobText)); diff != "" {
				t.Errorf("blobs (-want +got)\n%s", diff)
			}
			if diff := cmp.Diff(tc.entries, gather(t, inv.Entries(t.Context(), tc.filter), entryText)); diff != "" {
				t.Errorf("entries (-want +got)\n%s", diff)
			}
		})
	}
	for range 2000 { // more than a portion
		put(t, s, digest.SHA1, fmt.Sprint(len(s.Damaged), time.Now().UnixNano()))
	}
	n := 0
	for i, err := range inv.Blobs(t.Context(), inventory.Filter{Function: digest.SHA1}) {
		if err != nil {
			t.Fatal(err)
		}
		if i.StoredBytes < i.Digest.Size() || i.LastUse.Before(before) {
			t.Fatalf("%+v: want what it takes and when it was used", i)
		}
		n++
	}
	if n < 1500 { // two at the same nanosecond are one blob
		t.Errorf("%d blobs of 2000", n)
	}
	// To hear no more is no error, and ends what goes on behind it.
	if err := errors.Join(first(inv.Blobs(t.Context(), inventory.Filter{})), first(inv.Entries(t.Context(), inventory.Filter{}))); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, err := range inv.Blobs(ctx, inventory.Filter{}) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("a cancelled listing: %v", err)
		}
	}
}

func testStat(t *testing.T, start starter) {
	s, inv := start(t)
	a, b, absent := put(t, s, digest.SHA256, "a"), put(t, s, digest.BLAKE3, "bb"), digest.Of(digest.SHA256, []byte("absent"))
	infos, err := inv.Stat(t.Context(), []digest.Digest{b, absent, a, b})
	if err != nil {
		t.Fatal(err)
	}
	var got []digest.Digest
	for _, i := range infos {
		got = append(got, i.Digest)
		if i.StoredBytes < i.Digest.Size() || i.LastUse.IsZero() {
			t.Errorf("%+v: want what it takes and when it was used", i)
		}
	}
	if !slices.Equal(got, []digest.Digest{b, a, b}) {
		t.Errorf("Stat tells of %v, want %v", got, []digest.Digest{b, a, b})
	}
	k := putEntry(t, s, "i", "action")
	other := k
	other.Instance = "j"
	entries, err := inv.StatEntries(t.Context(), []blob.EntryKey{other, k})
	if err != nil || len(entries) != 1 || entries[0].Key != k || entries[0].Bytes != int64(len("value of action")) {
		t.Errorf("StatEntries: %+v, %v, want that of %v alone", entries, err, k)
	}
}

func testRemove(t *testing.T, start starter) {
	s, inv := start(t)
	stays, goes, absent := put(t, s, digest.SHA256, "stays"), put(t, s, digest.SHA256, "goes"), digest.Of(digest.SHA256, []byte("absent"))
	got, err := inv.Remove(t.Context(), []digest.Digest{absent, goes})
	if err != nil || !slices.Equal(got, []digest.Digest{absent}) {
		t.Errorf("Remove: %v, %v, want %v to have been absent", got, err, absent)
	}
	missing, err := s.FindMissing(t.Context(), []digest.Digest{stays, goes})
	if err != nil || !slices.Equal(missing, []digest.Digest{goes}) {
		t.Errorf("missing now: %v, %v, want %v", missing, err, goes)
	}
	k := putEntry(t, s, "i", "action")
	other := k
	other.Instance = "j"
	absentKeys, err := inv.RemoveEntries(t.Context(), []blob.EntryKey{other, k})
	if err != nil || !slices.Equal(absentKeys, []blob.EntryKey{other}) {
		t.Errorf("RemoveEntries: %v, %v, want %v to have been absent", absentKeys, err, other)
	}
	if _, err := s.Entry(t.Context(), k); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("the entry after its removal: %v", err)
	}
}

func testUsage(t *testing.T, start starter) {
	s, inv := start(t)
	put(t, s, digest.SHA256, "12345")
	put(t, s, digest.SHA256, "123")
	put(t, s, digest.SHA256, string(make([]byte, 4096)))
	put(t, s, digest.BLAKE3, string(make([]byte, 20_000)))
	putEntry(t, s, "i", "action")
	u, err := inv.Usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range u.By(func(c inventory.Class) inventory.Class { return c }) {
		got = append(got, fmt.Sprintf("%t %v %d %v: %d %d", r.Entries, r.Function, r.FromBytes, r.FromAge, r.Count, r.Bytes))
		if r.StoredBytes < r.Bytes {
			t.Errorf("%+v: want what it takes", r)
		}
	}
	want := []string{
		"false sha256 0 0s: 2 8",
		"false sha256 4096 0s: 1 4096",
		"false blake3 16384 0s: 1 20000",
		"true sha256 0 0s: 1 15",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func testVerify(t *testing.T, start starter) {
	s, inv := start(t)
	sound, corrupt, unreadable := put(t, s, digest.SHA256, "sound"), put(t, s, digest.SHA256, "corrupt"), put(t, s, digest.SHA256, "unreadable")
	gone, absent := put(t, s, digest.SHA256, "gone"), digest.Of(digest.SHA256, []byte("absent"))
	s.Damaged[corrupt], s.Damaged[unreadable], s.Damaged[gone] = blob.ErrCorrupt, io.ErrUnexpectedEOF, blob.ErrNotFound
	verify := func(ds ...digest.Digest) (map[digest.Digest]error, inventory.Progress) {
		found := map[digest.Digest]error{}
		var last inventory.Progress
		for p, err := range inv.Verify(t.Context(), inventory.VerifyOptions{Digests: ds}) {
			if err != nil {
				t.Fatal(err)
			}
			if last = p; p.Finding != nil {
				found[p.Finding.Digest] = p.Finding.Err
			}
		}
		return found, last
	}
	found, last := verify()
	if len(found) != 2 || !errors.Is(found[corrupt], blob.ErrCorrupt) || found[unreadable] == nil || errors.Is(found[unreadable], blob.ErrCorrupt) {
		t.Errorf("Verify of all finds %v, want one corrupt, one unreadable", found)
	}
	if last.Blobs != 4 || last.Bytes != int64(len("soundcorruptunreadablegone")) || last.Finding != nil {
		t.Errorf("at the end: %+v, want 4 blobs and no finding", last)
	}
	found, last = verify(sound, absent, corrupt)
	if len(found) != 2 || !errors.Is(found[corrupt], blob.ErrCorrupt) || !errors.Is(found[absent], blob.ErrNotFound) || last.Blobs != 3 {
		t.Errorf("Verify of three finds %v, at the end %+v; want one corrupt and one missing", found, last)
	}
	var many []digest.Digest
	for range 1500 { // more than go into one request
		many = append(many, sound)
	}
	if found, last := verify(many...); len(found) != 0 || last.Blobs != 1500 || last.Bytes != 1500*5 {
		t.Errorf("Verify of 1500 finds %v, at the end %+v", found, last)
	}
	if err := first(inv.Verify(t.Context(), inventory.VerifyOptions{})); err != nil {
		t.Error(err)
	}
	s.Damaged[sound] = blob.ErrUnavailable
	var err error
	for _, err = range inv.Verify(t.Context(), inventory.VerifyOptions{Digests: []digest.Digest{sound}}) {
		if err != nil {
			break
		}
	}
	if !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("Verify of a store that can't answer: %v, want ErrUnavailable", err)
	}
}

func testUnsupported(t *testing.T, inv inventory.Inventory) {
	_, removeErr := inv.Remove(t.Context(), []digest.Digest{digest.Of(digest.SHA256, []byte("x"))})
	_, usageErr := inv.Usage(t.Context())
	_, statErr := inv.Stat(t.Context(), []digest.Digest{digest.Of(digest.SHA256, []byte("x"))})
	for name, err := range map[string]error{
		"Blobs":  first(inv.Blobs(t.Context(), inventory.Filter{})),
		"Remove": removeErr,
		"Usage":  usageErr,
		"Stat":   statErr,
	} {
		if !errors.Is(err, inventory.ErrUnsupported) {
			t.Errorf("%s: %v, want ErrUnsupported", name, err)
		}
	}
}
