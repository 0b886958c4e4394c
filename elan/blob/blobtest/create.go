package blobtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

func testReceiveRefuses(t *testing.T, o Options) {
	s := o.New(t)
	data := Random(3, 700<<10)
	broken := errors.New("the line went dead")
	flipped := bytes.Clone(data)
	flipped[len(flipped)/2] ^= 1
	for _, c := range []struct {
		name string
		src  io.Reader
		want error
	}{
		{"other_bytes", bytes.NewReader(flipped), blob.ErrCorrupt},
		{"too_short", bytes.NewReader(data[:len(data)-1]), blob.ErrCorrupt},
		{"too_long", bytes.NewReader(append(bytes.Clone(data), 'x')), blob.ErrCorrupt},
		{"nothing", strings.NewReader(""), blob.ErrCorrupt},
		{"fails_at_once", iotest.ErrReader(broken), broken},
		{"fails_in_the_middle", io.MultiReader(bytes.NewReader(data[:len(data)/2]), iotest.ErrReader(broken)), broken},
		{"fails_at_the_end", io.MultiReader(bytes.NewReader(data), iotest.ErrReader(broken)), broken},
		{"fails_with_the_last_byte", iotest.DataErrReader(io.MultiReader(bytes.NewReader(data), iotest.ErrReader(broken))), broken},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := digest.Of(digest.SHA256, data)
			if err := blob.Receive(t.Context(), s, d, c.src); !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			wantAbsent(t, s, d)
		})
	}
	t.Run("bytes", func(t *testing.T) {
		d := digest.Of(digest.SHA256, data)
		for _, wrong := range [][]byte{flipped, data[1:], append(bytes.Clone(data), 0)} {
			if err := blob.ReceiveBytes(t.Context(), s, d, wrong); !errors.Is(err, blob.ErrCorrupt) {
				t.Errorf("ReceiveBytes: %v, want ErrCorrupt", err)
			}
		}
		wantAbsent(t, s, d)
	})
	t.Run("then_right", func(t *testing.T) {
		for name, r := range map[string]io.Reader{
			"one_byte_reads": iotest.OneByteReader(bytes.NewReader(data[:5000])),
			"data_with_eof":  iotest.DataErrReader(bytes.NewReader(data)),
		} {
			want := data
			if name == "one_byte_reads" {
				want = data[:5000]
			}
			d := digest.Of(digest.SHA256, want)
			if err := blob.Receive(t.Context(), s, d, r); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			wantBlob(t, s, d, want)
		}
	})
}

func testWriter(t *testing.T, o Options) {
	s := o.New(t)
	data := Random(4, 10_000)
	d := digest.Of(digest.SHA256, data)
	create := func(t *testing.T) blob.Writer {
		t.Helper()
		w, err := s.Create(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	t.Run("without_commit", func(t *testing.T) {
		w := create(t)
		if n, err := w.Write(data); n != len(data) || err != nil {
			t.Errorf("write: %d, %v", n, err)
		}
		wantAbsent(t, s, d)
		if err := errors.Join(w.Close(), w.Close()); err != nil {
			t.Errorf("close twice: %v", err)
		}
		wantAbsent(t, s, d)
		if err := w.Commit(); err == nil {
			t.Error("commit after close: no error")
		}
		wantAbsent(t, s, d)
	})
	t.Run("too_few_bytes", func(t *testing.T) {
		w := create(t)
		_, err := w.Write(data[1:])
		if err := errors.Join(err, w.Commit()); err == nil {
			t.Error("no error")
		}
		_ = w.Close()
		wantAbsent(t, s, d)
	})
	t.Run("too_many_bytes", func(t *testing.T) {
		w := create(t)
		_, err := w.Write(data)
		_, err2 := w.Write([]byte("x"))
		if err := errors.Join(err, err2, w.Commit()); err == nil {
			t.Error("no error")
		}
		_ = w.Close()
		wantAbsent(t, s, d)
	})
	t.Run("commit", func(t *testing.T) {
		w := create(t)
		for chunk := range slicesOf(data, 999) {
			if _, err := w.Write(chunk); err != nil {
				t.Fatal(err)
			}
			clear(chunk) // a writer does not keep what it was given
		}
		if err := errors.Join(w.Commit(), w.Close(), w.Close()); err != nil {
			t.Fatal(err)
		}
		wantBlob(t, s, d, Random(4, 10_000))
	})
}

// slicesOf yields copies of the portions of data.
func slicesOf(data []byte, size int) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(data) > 0 {
			n := min(size, len(data))
			if !yield(bytes.Clone(data[:n])) {
				return
			}
			data = data[n:]
		}
	}
}

func testCreateAgain(t *testing.T, o Options) {
	s := o.New(t)
	data := Random(5, 5000)
	d := Put(t, s, digest.SHA256, data)
	Put(t, s, digest.SHA256, data)
	wantBlob(t, s, d, data)
	// One who gives up, or sends rubbish, does no harm to what is there.
	w, err := s.Create(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write([]byte("rubbish"))
	if err := errors.Join(err, w.Close()); err != nil {
		t.Error(err)
	}
	rubbish := Random(6, len(data))
	if err := blob.Receive(t.Context(), s, d, bytes.NewReader(rubbish)); !errors.Is(err, blob.ErrCorrupt) {
		t.Errorf("other bytes for a blob that is there: %v, want ErrCorrupt", err)
	}
	wantBlob(t, s, d, data)
}

func testConcurrentCreate(t *testing.T, o Options) {
	s := o.New(t)
	for round := range 5 {
		data := Random(uint64(100+round), 50_000)
		d := digest.Of(digest.SHA256, data)
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				src, want := io.Reader(bytes.NewReader(data)), error(nil)
				if i%4 == 3 {
					src, want = bytes.NewReader(data[:i]), blob.ErrCorrupt
				}
				if err := blob.Receive(t.Context(), s, d, src); !errors.Is(err, want) {
					t.Errorf("writer %d: %v, want %v", i, err, want)
				}
				if want == nil {
					wantBlob(t, s, d, data)
				}
			})
		}
		wg.Wait()
		wantBlob(t, s, d, data)
	}
}

func testConcurrentReaders(t *testing.T, o Options) {
	s := o.New(t)
	data := Random(7, 1<<20)
	d := Put(t, s, digest.SHA256, data)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			off := int64(i * 1000)
			r, err := s.Open(t.Context(), d, off)
			if err != nil {
				t.Errorf("reader %d: %v", i, err)
				return
			}
			got, err := io.ReadAll(r)
			if err = errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, data[off:]) {
				t.Errorf("reader %d: %d bytes, error %v", i, len(got), err)
			}
			Put(t, s, digest.SHA256, fmt.Appendf(nil, "of reader %d", i))
		})
	}
	wg.Wait()
}

func testCancelled(t *testing.T, o Options) {
	s := o.New(t)
	data := Random(8, 600<<10)
	d, absent := Put(t, s, digest.SHA256, data), digest.Of(digest.SHA256, []byte("absent"))
	gone := cancelledContext(t)
	if _, err := s.FindMissing(gone, []digest.Digest{d, absent}); !errors.Is(err, context.Canceled) {
		t.Errorf("FindMissing: %v, want Canceled", err)
	}
	if r, err := s.Open(gone, d, 0); err == nil {
		_, err = io.ReadAll(r)
		_ = r.Close()
		if !errors.Is(err, context.Canceled) {
			t.Errorf("Open and read: %v, want Canceled", err)
		}
	} else if !errors.Is(err, context.Canceled) {
		t.Errorf("Open: %v, want Canceled", err)
	}
	if err := blob.ReceiveBytes(gone, s, absent, []byte("absent")); !errors.Is(err, context.Canceled) {
		t.Errorf("ReceiveBytes: %v, want Canceled", err)
	}
	wantAbsent(t, s, absent)

	// Cancelled between the halves of an upload, which must leave nothing.
	ctx, cancel := context.WithCancel(t.Context())
	half := Random(9, 600<<10)
	hd := digest.Of(digest.SHA256, half)
	src := io.MultiReader(bytes.NewReader(half[:300<<10]), readerFunc(func([]byte) (int, error) { cancel(); return 0, io.EOF }), bytes.NewReader(half[300<<10:]))
	if err := blob.Receive(ctx, s, hd, src); !errors.Is(err, context.Canceled) {
		t.Errorf("Receive cancelled in the middle: %v, want Canceled", err)
	}
	wantAbsent(t, s, hd)
	wantBlob(t, s, d, data)
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// testHugeDeclared: a digest that claims a petabyte costs nothing, and is
// refused at once, or when the bytes do not come.
func testHugeDeclared(t *testing.T, o Options) {
	s := o.New(t)
	for _, size := range []int64{1 << 50, 1<<63 - 1} {
		d, err := digest.New(digest.SHA256, digest.Of(digest.SHA256, []byte("x")).Hash(), size)
		if err != nil {
			t.Fatal(err)
		}
		if err := blob.Receive(t.Context(), s, d, strings.NewReader("x")); err == nil {
			t.Errorf("size %d: no error", size)
		}
		wantAbsent(t, s, d)
	}
	Put(t, s, digest.SHA256, []byte("and there is room still"))
}
