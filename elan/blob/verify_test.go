package blob_test

import (
	"bytes"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
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

// piecesSink is a sink that takes pieces.
type piecesSink struct {
	sink
	calls int
}

func (s *piecesSink) WritePieces(pieces [][]byte) (total int, err error) {
	s.calls++
	for _, p := range pieces {
		n, err := s.Write(p)
		total += n
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// TestVerifying_WritePieces holds that the bytes are given up exactly once, and
// not before they are both stored and hashed: they are overwritten then.
func TestVerifying_WritePieces(t *testing.T) {
	full := errors.New("full")
	for _, tc := range []struct {
		name   string
		sizes  []int // of the calls
		pieces int   // of each
		short  int64 // how much less the digest says
		err    error // of the sink
		want   error
	}{
		{name: "small", sizes: []int{10, 20}, pieces: 2},
		{name: "large", sizes: []int{1 << 20, 1 << 20, 1 << 20, 5}, pieces: 64},
		{name: "in one piece", sizes: []int{1 << 20, 1 << 20}, pieces: 1},
		{name: "nothing", sizes: []int{0, 1 << 20, 0}, pieces: 3},
		{name: "too much", sizes: []int{1 << 20, 1 << 20}, pieces: 4, short: 1, want: blob.ErrCorrupt},
		{name: "the sink's error", sizes: []int{1 << 20, 1 << 20}, pieces: 4, err: full, want: full},
	} {
		for _, withPieces := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%v", tc.name, withPieces), func(t *testing.T) {
				data := blobtest.Random(1, sum(tc.sizes))
				s := &piecesSink{sink: sink{err: tc.err}}
				var w blob.Writer = &s.sink
				if withPieces {
					w = s
				}
				v := blob.Verify(w, digest.Of(digest.SHA256, data[:int64(len(data))-tc.short]))
				var done atomic.Int32
				rest := data
				for _, n := range tc.sizes {
					part := bytes.Clone(rest[:n])
					rest = rest[n:]
					// What fails here fails again in Commit.
					_ = v.WritePieces(cut(part, tc.pieces), func() {
						done.Add(1)
						clear(part)
					})
				}
				err := v.Commit()
				if !errors.Is(err, tc.want) || tc.want == nil && (err != nil || !bytes.Equal(s.Bytes(), data)) {
					t.Errorf("Commit: %v, want %v; %d bytes are stored", err, tc.want, s.Len())
				}
				if err := v.Close(); err != nil {
					t.Error(err)
				}
				if n := int(done.Load()); n != len(tc.sizes) {
					t.Errorf("the bytes were given up %d times, want %d", n, len(tc.sizes))
				}
				if tc.pieces > 1 && withPieces != (s.calls > 0) {
					t.Errorf("%d calls of WritePieces", s.calls)
				}
			})
		}
	}
}

func sum(ns []int) (n int) {
	for _, m := range ns {
		n += m
	}
	return n
}

// cut cuts p into n pieces.
func cut(p []byte, n int) (pieces [][]byte) {
	for ; n > 0; n-- {
		k := len(p) / n
		pieces = append(pieces, p[:k:k])
		p = p[k:]
	}
	return pieces
}
