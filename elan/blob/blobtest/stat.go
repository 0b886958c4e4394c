package blobtest

import (
	"errors"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// testStatter: what is there is told of, and nothing else.
func testStatter(t *testing.T, o Options) {
	s := o.New(t)
	st, ok := blob.As[blob.Statter](s)
	if !ok {
		t.Skip("it is no Statter")
	}
	for _, fn := range o.functions() {
		data := Random(1, 10_000)
		d := digest.Of(fn, data)
		if _, err := st.Stat(t.Context(), d); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("Stat of %s, which is not there: %v, want ErrNotFound", d, err)
		}
		if err := blob.ReceiveBytes(t.Context(), s, d, data); err != nil {
			t.Fatal(err)
		}
		if info, err := st.Stat(t.Context(), d); err != nil || info.Digest != d || info.StoredBytes <= 0 {
			t.Errorf("Stat of %s: %+v, %v", d, info, err)
		}
		other, err := digest.New(fn, d.Hash(), d.Size()+1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.Stat(t.Context(), other); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("Stat of %s, of another size than what is there: %v, want ErrNotFound", other, err)
		}
		if _, err := st.Stat(t.Context(), digest.Empty(fn)); err != nil {
			t.Errorf("Stat of the empty blob: %v", err)
		}
	}
	if _, err := st.Stat(t.Context(), digest.Digest{}); !errors.Is(err, digest.ErrInvalid) {
		t.Errorf("Stat of the zero digest: %v, want ErrInvalid", err)
	}
}

// testEntryStatter: as testStatter.
func testEntryStatter(t *testing.T, o Options) {
	s := o.New(t)
	st, ok := blob.As[blob.EntryStatter](s)
	if _, keeps := s.(blob.Entries); !ok || !keeps {
		t.Skip("it is no EntryStatter")
	}
	for _, fn := range o.functions() {
		for _, instance := range []string{"", "some/instance"} {
			k := blob.EntryKey{Instance: instance, Action: digest.Of(fn, []byte("action"))}
			if _, err := st.StatEntry(t.Context(), k); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("StatEntry of %v, which is not there: %v, want ErrNotFound", k, err)
			}
			if err := s.(blob.Entries).PutEntry(t.Context(), k, []byte("value")); err != nil {
				t.Fatal(err)
			}
			if info, err := st.StatEntry(t.Context(), k); err != nil || info.Key != k || info.Bytes < 5 {
				t.Errorf("StatEntry of %v: %+v, %v", k, info, err)
			}
		}
	}
}

// testChecker: what is sound is found sound, and what is absent is not taken for
// corrupt. Stores of which the bytes can be changed test that themselves.
func testChecker(t *testing.T, o Options) {
	s := o.New(t)
	c, ok := blob.As[blob.Checker](s)
	if !ok {
		t.Skip("it is no Checker")
	}
	for _, fn := range o.functions() {
		for _, size := range []int{1, 10_000, o.largeBytes()} {
			data := Random(uint64(size), size) //nolint:gosec // not negative
			d := digest.Of(fn, data)
			if err := c.Check(t.Context(), d); !errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrCorrupt) {
				t.Errorf("Check of %s, which is not there: %v, want ErrNotFound", d, err)
			}
			if err := blob.ReceiveBytes(t.Context(), s, d, data); err != nil {
				t.Fatal(err)
			}
			if err := c.Check(t.Context(), d); err != nil {
				t.Errorf("Check of %s: %v", d, err)
			}
		}
		if err := c.Check(t.Context(), digest.Empty(fn)); err != nil {
			t.Errorf("Check of the empty blob: %v", err)
		}
	}
}
