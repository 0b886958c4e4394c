package observed_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/observed"
	"github.com/mettle-build/mettle/elan/digest"
)

// TestStore_whole: what a store does with small blobs, and with many pieces, it
// does under observation too, and is counted as other calls are.
func TestStore_whole(t *testing.T) {
	inner, err := file.New(file.Options{Dir: filepath.Join(t.TempDir(), "s"), MinFreeBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	reg := prometheus.NewPedanticRegistry()
	s := newObserver(t, observed.Options{Registerer: reg}).Store("m", inner)

	data := []byte("twelve bytes")
	d := digest.Of(digest.SHA256, data)
	if err := s.WriteWhole(t.Context(), d, data); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data))
	if err := s.ReadWhole(t.Context(), d, got); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read %q, %v", got, err)
	}
	large := blobtest.Random(1, 1<<20)
	ld := digest.Of(digest.SHA256, large)
	if err := s.WriteWhole(t.Context(), ld, large); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a large blob: %v, want ErrUnsupported", err)
	}
	writePieces(t, s, ld, large)
	want := map[string]float64{
		"calls_total write ok": 2, "call_seconds write": 2, "bytes_total written": 12 + 1<<20,
		"calls_total open ok": 1, "call_seconds open": 1, "calls_total read ok": 1, "bytes_total read": 12,
	}
	if diff := cmp.Diff(want, counts(t, reg)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// TestStore_wholeUnsupported: a store without the abilities is asked the usual way.
func TestStore_wholeUnsupported(t *testing.T) {
	s := newObserver(t, observed.Options{}).Store("m", newMem(t))
	data := blobtest.Random(1, 1000)
	d := digest.Of(digest.SHA256, data)
	if err := s.WriteWhole(t.Context(), d, data); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("%v, want ErrUnsupported", err)
	}
	if err := s.ReadWhole(t.Context(), d, data); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("%v, want ErrUnsupported", err)
	}
	writePieces(t, s, d, data)
	if got, err := blob.ReadAll(t.Context(), s, d, 1000); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func writePieces(t *testing.T, s blob.Store, d digest.Digest, data []byte) {
	t.Helper()
	w, err := s.Create(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	half := len(data) / 2
	n, err := w.(blob.PiecesWriter).WritePieces([][]byte{data[:half], nil, data[half:]})
	if err := errors.Join(err, w.Commit(), w.Close()); err != nil || n != len(data) {
		t.Errorf("%d bytes written, %v", n, err)
	}
}
