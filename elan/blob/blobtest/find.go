package blobtest

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

func testFindMissing(t *testing.T, o Options) {
	s := o.New(t)
	fn := o.functions()[0]
	a, b := Put(t, s, fn, []byte("a")), Put(t, s, fn, []byte("b"))
	x, y, z := digest.Of(fn, []byte("x")), digest.Of(fn, []byte("y")), digest.Of(fn, []byte("z"))
	e := digest.Empty(fn)
	for _, c := range []struct {
		name     string
		ask, get []digest.Digest
	}{
		{"none", nil, nil},
		{"all_there", []digest.Digest{a, b, a, e}, nil},
		{"order_of_the_question", []digest.Digest{z, a, x, b, y}, []digest.Digest{z, x, y}},
		{"each_once", []digest.Digest{y, x, y, a, x, y}, []digest.Digest{y, x}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := s.FindMissing(t.Context(), c.ask)
			if err != nil {
				t.Fatal(err)
			}
			equal := cmp.Comparer(func(a, b digest.Digest) bool { return a == b })
			if diff := cmp.Diff(c.get, append([]digest.Digest(nil), got...), equal); diff != "" {
				t.Errorf("missing, -want +got:\n%s", diff)
			}
		})
	}
}

// testFindMany asks for thousands of digests at once, one in ten of which is
// there.
func testFindMany(t *testing.T, o Options) {
	s := o.New(t)
	ask := make([]digest.Digest, o.findDigests())
	var want []digest.Digest
	for i := range ask {
		data := binary.BigEndian.AppendUint64(nil, uint64(i)) //nolint:gosec // not negative
		ask[i] = digest.Of(digest.SHA256, data)
		if i%10 != 0 {
			want = append(want, ask[i])
		} else if err := blob.ReceiveBytes(t.Context(), s, ask[i], data); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.FindMissing(t.Context(), ask)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(want) {
		t.Fatalf("%d digests missing, want %d", len(got), len(want))
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("missing digest %d is %s, want %s", i, got[i], want[i])
		}
	}
}
