package blob_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// sink is a blob.Writer that notes what happens to it.
type sink struct {
	bytes.Buffer
	err       error // of Write
	committed bool
	closed    bool
}

func (s *sink) Write(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	return s.Buffer.Write(p)
}
func (s *sink) Commit() error { s.committed = true; return nil }
func (s *sink) Close() error  { s.closed = true; return nil }

func TestVerify(t *testing.T) {
	d := digest.Of(digest.SHA256, []byte("hello, world"))
	for _, tc := range []struct {
		name   string
		pieces []string
		good   bool
	}{
		{"whole", []string{"hello, world"}, true},
		{"pieces", []string{"hello", "", ", world"}, true},
		{"nothing", nil, false},
		{"too few", []string{"hello, worl"}, false},
		{"too many at once", []string{"hello, world!"}, false},
		{"too many in the end", []string{"hello, world", "!"}, false},
		{"others", []string{"hello, World"}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &sink{}
			w := blob.Verify(s, d)
			for _, p := range tc.pieces {
				// What fails here fails again in Commit.
				_, _ = w.Write([]byte(p))
			}
			err := w.Commit()
			if s.committed != tc.good || (err == nil) != tc.good {
				t.Errorf("Commit: %v, committed %v, want %v", err, s.committed, tc.good)
			}
			if !tc.good && !errors.Is(err, blob.ErrCorrupt) {
				t.Errorf("Commit: %v, want ErrCorrupt", err)
			}
			if err := w.Close(); err != nil || !s.closed {
				t.Errorf("Close: %v, closed %v", err, s.closed)
			}
		})
	}
}

func TestVerify_keeps_the_writers_error(t *testing.T) {
	s := &sink{err: blob.ErrFull}
	w := blob.Verify(s, digest.Of(digest.SHA256, []byte("x")))
	if _, err := w.Write([]byte("x")); !errors.Is(err, blob.ErrFull) {
		t.Errorf("Write: %v, want ErrFull", err)
	}
	s.err = nil
	if _, err := w.Write([]byte("x")); !errors.Is(err, blob.ErrFull) {
		t.Errorf("the next Write: %v, want ErrFull", err)
	}
	if err := w.Commit(); !errors.Is(err, blob.ErrFull) || s.committed {
		t.Errorf("Commit: %v, want ErrFull", err)
	}
}
