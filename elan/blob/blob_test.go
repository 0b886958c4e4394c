package blob_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/iotest"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

func newStore(t testing.TB) *mem.Store {
	t.Helper()
	s, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestReceive_storeFails: the store's error comes back as it is, at whatever
// call it occurs, and nothing becomes visible.
func TestReceive_storeFails(t *testing.T) {
	data := blobtest.Random(1, 600<<10)
	d := digest.Of(digest.SHA256, data)
	for _, op := range []blobtest.Op{blobtest.OpCreate, blobtest.OpWrite, blobtest.OpCommit} {
		t.Run(string(op), func(t *testing.T) {
			s := newStore(t)
			f := blobtest.Faulty{Store: s, Fault: func(o blobtest.Op, _ digest.Digest) error {
				if o == op {
					return blob.ErrFull
				}
				return nil
			}}
			if err := blob.Receive(t.Context(), f, d, bytes.NewReader(data)); !errors.Is(err, blob.ErrFull) {
				t.Errorf("Receive: %v, want ErrFull", err)
			}
			if err := blob.ReceiveBytes(t.Context(), f, d, data); !errors.Is(err, blob.ErrFull) {
				t.Errorf("ReceiveBytes: %v, want ErrFull", err)
			}
			if m, err := s.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(m) != 1 {
				t.Errorf("missing %v, %v; want the blob", m, err)
			}
		})
	}
}

func TestReadAll(t *testing.T) {
	s := newStore(t)
	d, err := blob.PutBytes(t.Context(), s, digest.SHA256, []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := blob.ReadAll(t.Context(), s, d, 5); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := blob.ReadAll(t.Context(), s, d, 4); !errors.Is(err, blob.ErrTooLarge) {
		t.Errorf("over the limit: %v, want ErrTooLarge", err)
	}
	broken := errors.New("broken disk")
	f := blobtest.Faulty{Store: s, Fault: func(o blobtest.Op, _ digest.Digest) error {
		if o == blobtest.OpRead {
			return broken
		}
		return nil
	}}
	if _, err := blob.ReadAll(t.Context(), f, d, 5); !errors.Is(err, broken) {
		t.Errorf("%v, want the store's error", err)
	}
	if _, err := blob.ReadAll(t.Context(), short{f.Store}, d, 5); !errors.Is(err, blob.ErrCorrupt) {
		t.Errorf("a store whose copy ends early: %v, want ErrCorrupt", err)
	}
}

// short is a store that has lost the end of each blob.
type short struct{ blob.Store }

func (s short) Open(ctx context.Context, d digest.Digest, off int64) (io.ReadCloser, error) {
	r, err := s.Store.Open(ctx, d, off)
	if err != nil {
		return nil, err
	}
	return io.NopCloser(io.LimitReader(r, d.Size()-1)), nil
}

func TestMessages(t *testing.T) {
	s := newStore(t)
	want := &repb.Command{Arguments: []string{"true"}}
	d, err := blob.PutMessage(t.Context(), s, digest.SHA256, want)
	if err != nil {
		t.Fatal(err)
	}
	got := &repb.Command{}
	if err := blob.ReadMessage(t.Context(), s, d, 1<<20, got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	rubbish, err := blob.PutBytes(t.Context(), s, digest.SHA256, []byte("\xff\xff\xff"))
	if err != nil {
		t.Fatal(err)
	}
	if err := blob.ReadMessage(t.Context(), s, rubbish, 1<<20, got); !errors.Is(err, blob.ErrMalformed) {
		t.Errorf("rubbish: %v, want ErrMalformed", err)
	}
	absent := digest.Of(digest.SHA256, []byte("absent"))
	if err := blob.ReadMessage(t.Context(), s, absent, 1<<20, got); !errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrMalformed) {
		t.Errorf("absent: %v, want ErrNotFound", err)
	}
}

func TestMissingError(t *testing.T) {
	a, b := digest.Of(digest.SHA256, []byte("a")), digest.Of(digest.SHA256, []byte("b"))
	for want, e := range map[string]*blob.MissingError{
		"blob " + a.String() + " is missing":               {Digests: []digest.Digest{a}},
		"blob " + a.String() + " and 2 others are missing": {Digests: []digest.Digest{a, b, b}},
	} {
		if err := fmt.Errorf("wrapped: %w", e); e.Error() != want || !errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrCorrupt) {
			t.Errorf("%q, want %q and ErrNotFound", e, want)
		}
	}
}

// FuzzReceive: whatever comes in whatever portions, exactly the right bytes get
// in.
func FuzzReceive(f *testing.F) {
	f.Add([]byte("hello"), []byte("hello"), byte(0), byte(1))
	f.Add([]byte("hello"), []byte("hell"), byte(1), byte(1))
	f.Add([]byte(""), []byte("x"), byte(2), byte(2))
	f.Add([]byte("hello"), []byte("hello!"), byte(3), byte(5))
	f.Fuzz(func(t *testing.T, want, sent []byte, how, fn byte) {
		function := digest.Functions()[int(fn)%len(digest.Functions())]
		s, d := newStore(t), digest.Of(function, want)
		var r io.Reader = bytes.NewReader(sent)
		switch how % 4 {
		case 1:
			r = iotest.OneByteReader(r)
		case 2:
			r = iotest.DataErrReader(r)
		case 3:
			r = iotest.HalfReader(r)
		}
		err := blob.Receive(t.Context(), s, d, r)
		if right := bytes.Equal(want, sent); right != (err == nil) || !right && !errors.Is(err, blob.ErrCorrupt) {
			t.Fatalf("%q for %q: %v", sent, want, err)
		}
		missing, ferr := s.FindMissing(t.Context(), []digest.Digest{d})
		if ferr != nil || (len(missing) > 0) != (err != nil && !d.IsEmpty()) {
			t.Fatalf("after %v: missing %v, %v", err, missing, ferr)
		}
		if err == nil {
			if got, err := blob.ReadAll(t.Context(), s, d, 1<<20); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("read back %q, %v; want %q", got, err, want)
			}
		}
	})
}

// looking is a store that looks after itself, within another.
type looking struct{ blob.Store }

func (looking) Stat(context.Context, digest.Digest) (blob.Info, error) { return blob.Info{}, nil }

func TestAs(t *testing.T) {
	s := looking{newStore(t)}
	outer := blobtest.Faulty{Store: blobtest.Faulty{Store: s}}
	if got, ok := blob.As[blob.Statter](outer); !ok || got != blob.Statter(s) {
		t.Errorf("As of a store two layers down: %v, %v", got, ok)
	}
	if _, ok := blob.As[blob.Linker](outer); ok {
		t.Error("As found a Linker where there is none")
	}
}
