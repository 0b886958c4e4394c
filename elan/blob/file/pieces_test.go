package file_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

// TestWriter_WritePieces writes more pieces than a system call takes, some of
// them empty, and the rest by Write.
func TestWriter_WritePieces(t *testing.T) {
	s := open(t, file.Options{})
	data := blobtest.Random(1, 3<<20+17)
	d := digest.Of(digest.SHA256, data)
	pieces := func() (list [][]byte) {
		for rest := data[:3<<20]; len(rest) > 0; rest = rest[1<<10:] {
			list = append(list, rest[:1000], nil, rest[1000:1<<10])
		}
		return list
	}
	for _, again := range []bool{false, true} { // the second time it is there
		w, err := s.Create(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		pw, ok := w.(blob.PiecesWriter)
		if !ok {
			t.Fatalf("%T takes no pieces", w)
		}
		if n, err := pw.WritePieces(pieces()); err != nil || n != 3<<20 {
			t.Fatalf("WritePieces: %d, %v", n, err)
		}
		if _, err := w.Write(data[3<<20:]); err != nil {
			t.Fatal(err)
		}
		if err := w.Commit(); err != nil {
			t.Fatalf("again %v: %v", again, err)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		if got, err := blob.ReadAll(t.Context(), s, d, 4<<20); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	w, err := s.Create(t.Context(), digest.Of(digest.SHA256, data[1:]))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.(blob.PiecesWriter).WritePieces([][]byte{data[:1], data[1:]}); !errors.Is(err, blob.ErrCorrupt) {
		t.Errorf("a byte too many: %v, want ErrCorrupt", err)
	}
	if err := w.Commit(); err == nil {
		t.Error("Commit after a byte too many: no error")
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}
