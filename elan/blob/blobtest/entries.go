package blobtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

func testEntries(t *testing.T, o Options) {
	if _, ok := o.New(t).(blob.Entries); !ok {
		t.Skip("the store keeps no entries")
	}
	t.Run("life", func(t *testing.T) { testEntryLife(t, entriesOf(t, o)) })
	t.Run("isolation", func(t *testing.T) { testEntryIsolation(t, o) })
	t.Run("concurrent_overwrite", func(t *testing.T) { testEntryOverwrite(t, entriesOf(t, o)) })
	t.Run("cancelled", func(t *testing.T) {
		e, gone := entriesOf(t, o), cancelledContext(t)
		k := blob.EntryKey{Action: digest.Of(digest.SHA256, []byte("k"))}
		_, err := e.Entry(gone, k)
		for _, err := range []error{err, e.PutEntry(gone, k, []byte("v")), e.DeleteEntry(gone, k)} {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("error %v, want Canceled", err)
			}
		}
		wantNoEntry(t, e, k)
	})
}

func entriesOf(t testing.TB, o Options) blob.Entries { return o.New(t).(blob.Entries) }

func wantEntry(t testing.TB, e blob.Entries, k blob.EntryKey, want []byte) {
	t.Helper()
	if got, err := e.Entry(t.Context(), k); err != nil || !bytes.Equal(got, want) {
		t.Errorf("entry %q %s: %.100q, %v; want %.100q", k.Instance, k.Action, got, err, want)
	}
}

func wantNoEntry(t testing.TB, e blob.Entries, k blob.EntryKey) {
	t.Helper()
	if got, err := e.Entry(t.Context(), k); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("entry %q %s: %.100q, %v; want ErrNotFound", k.Instance, k.Action, got, err)
	}
}

func putEntry(t testing.TB, e blob.Entries, k blob.EntryKey, value []byte) {
	t.Helper()
	if err := e.PutEntry(t.Context(), k, value); err != nil {
		t.Errorf("put entry %q %s: %v", k.Instance, k.Action, err)
	}
}

func testEntryLife(t *testing.T, e blob.Entries) {
	k := blob.EntryKey{Instance: "main", Action: digest.Of(digest.SHA256, []byte("action"))}
	wantNoEntry(t, e, k)
	if err := e.DeleteEntry(t.Context(), k); err != nil {
		t.Errorf("delete what is not there: %v", err)
	}
	value := []byte("first")
	putEntry(t, e, k, value)
	clear(value) // it does not keep value
	wantEntry(t, e, k, []byte("first"))
	got, err := e.Entry(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	clear(got) // the caller owns it
	wantEntry(t, e, k, []byte("first"))
	for _, v := range [][]byte{[]byte("a longer second"), {}, Random(1, 1<<20), []byte("short")} {
		putEntry(t, e, k, v)
		wantEntry(t, e, k, v)
	}
	if err := e.DeleteEntry(t.Context(), k); err != nil {
		t.Error(err)
	}
	wantNoEntry(t, e, k)
	if err := e.PutEntry(t.Context(), blob.EntryKey{}, []byte("v")); err == nil {
		t.Error("put under the zero digest: no error")
	}
}

// testEntryIsolation: every key has its own value, and none is a blob.
func testEntryIsolation(t *testing.T, o Options) {
	s := o.New(t)
	e := s.(blob.Entries)
	action := []byte("the action")
	long := string(bytes.Repeat([]byte("long/"), 100))
	var keys []blob.EntryKey
	for _, instance := range []string{"", "a", "A", "a/b", "a-b", "../../x", "\x00", "ünï code", long, long + "x"} {
		for _, fn := range o.functions() {
			keys = append(keys, blob.EntryKey{Instance: instance, Action: digest.Of(fn, action)})
		}
	}
	other, err := digest.New(digest.SHA256, digest.Of(digest.SHA256, action).Hash(), int64(len(action))+1)
	if err != nil {
		t.Fatal(err)
	}
	keys = append(keys, blob.EntryKey{Action: other})
	for i, k := range keys {
		wantNoEntry(t, e, k)
		putEntry(t, e, k, fmt.Appendf(nil, "value %d", i))
	}
	for i, k := range keys {
		wantEntry(t, e, k, fmt.Appendf(nil, "value %d", i))
		wantAbsent(t, s, k.Action)
	}
	if err := e.DeleteEntry(t.Context(), keys[0]); err != nil {
		t.Error(err)
	}
	for i, k := range keys[1:] {
		wantEntry(t, e, k, fmt.Appendf(nil, "value %d", i+1))
	}
	d := Put(t, s, digest.SHA256, action)
	wantNoEntry(t, e, keys[0])
	wantBlob(t, s, d, action)
}

// testEntryOverwrite: readers see one value or another, whole.
func testEntryOverwrite(t *testing.T, e blob.Entries) {
	k := blob.EntryKey{Instance: "i", Action: digest.Of(digest.SHA256, []byte("action"))}
	value := func(i int) []byte { return bytes.Repeat([]byte{byte('a' + i)}, 1+i*9000) }
	putEntry(t, e, k, value(0))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 20 {
				putEntry(t, e, k, value(i))
				got, err := e.Entry(t.Context(), k)
				if err != nil || len(got) == 0 || !bytes.Equal(got, value(int(got[0]-'a'))) {
					t.Errorf("read %d bytes, error %v: not one of the values", len(got), err)
				}
			}
		})
	}
	wg.Wait()
}
