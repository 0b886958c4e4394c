package retry_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/blob/retry"
	"github.com/mettle-build/mettle/elan/digest"
)

// batches is a store that tells of batches what it is made to.
type batches struct {
	blob.Store
	read  func(ds []digest.Digest, take func(i int, data []byte, err error)) error
	write func() error
}

func (b *batches) ReadBatch(_ context.Context, ds []digest.Digest, take func(i int, data []byte, err error)) error {
	return b.read(ds, take)
}

func (b *batches) WriteBatch(context.Context, []blob.Bytes) error { return b.write() }

// What did not come is asked for again, by itself.
func TestReadBatch_repeats_what_did_not_come(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ds []digest.Digest
		for i := range 5 {
			ds = append(ds, digest.Of(digest.SHA256, fmt.Append(nil, i)))
		}
		var asked [][]digest.Digest
		inner := &batches{read: func(now []digest.Digest, take func(i int, data []byte, err error)) error {
			asked = append(asked, slices.Clone(now))
			switch len(asked) {
			case 1: // two of five, and then the server is gone
				take(3, []byte("3"), nil)
				take(1, nil, blob.ErrNotFound)
				return blob.ErrUnavailable
			case 2: // one of three is away by itself
				take(0, []byte("0"), nil)
				take(1, nil, blob.ErrUnavailable)
				take(2, []byte("4"), nil)
				return nil
			}
			take(0, []byte("2"), nil)
			return nil
		}}
		r, err := retry.New(retry.Options{})
		if err != nil {
			t.Fatal(err)
		}
		got := make([]string, len(ds))
		err = r.Store(inner).ReadBatch(t.Context(), ds, func(i int, data []byte, err error) { got[i] += fmt.Sprint(string(data), err) })
		if err != nil {
			t.Fatal(err)
		}
		if want := []string{"0<nil>", "not found", "2<nil>", "3<nil>", "4<nil>"}; !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		if len(asked) != 3 || !slices.Equal(asked[1], []digest.Digest{ds[0], ds[2], ds[4]}) || !slices.Equal(asked[2], ds[2:3]) {
			t.Errorf("asked for %v", asked)
		}
	})
}

func TestWriteBatch_repeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		inner := &batches{write: func() error {
			if n++; n < 3 {
				return blob.ErrUnavailable
			}
			return nil
		}}
		r, err := retry.New(retry.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Store(inner).WriteBatch(t.Context(), nil); err != nil || n != 3 {
			t.Errorf("%d attempts, %v, want 3", n, err)
		}
	})
}

// Where the store has no batches, what asks for them knows.
func TestBatches_of_a_store_without(t *testing.T) {
	inner, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := retry.New(retry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := r.Store(inner)
	bs := []blob.Bytes{}
	var ds []digest.Digest
	for i := range 100 {
		data := fmt.Append(nil, i)
		bs = append(bs, blob.Bytes{Digest: digest.Of(digest.SHA256, data), Data: data})
		ds = append(ds, bs[i].Digest)
	}
	if err := s.WriteBatch(t.Context(), bs); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("WriteBatch: %v, want ErrUnsupported", err)
	}
	if err := blob.WriteBatch(t.Context(), s, bs); err != nil {
		t.Fatal(err)
	}
	got := make([]string, len(ds))
	if err := blob.ReadBatch(t.Context(), s, ds, func(i int, data []byte, err error) { got[i] = fmt.Sprint(string(data), err) }); err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if want := fmt.Sprintf("%d<nil>", i); got[i] != want {
			t.Errorf("blob %d: %q, want %q", i, got[i], want)
		}
	}
}
