package compressed_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/compressed"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

const headerBytes = 24

func newInside(t testing.TB) *mem.Store {
	t.Helper()
	m, err := mem.New(mem.Options{MaxBytes: 300 << 20, Containers: true})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func newStore(t testing.TB, o compressed.Options) *compressed.Store {
	t.Helper()
	s, err := compressed.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// text is size bytes that compress to a fourth or so.
func text(size int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < size; i++ {
		fmt.Fprintf(&b, "func line%d(x int) int { return x*%d + %d }\n", i, i*7919%1000, i*104729%977)
	}
	return b.Bytes()[:size]
}

// zstdOf is data as one frame of another encoder's, or more.
func zstdOf(t testing.TB, data []byte, o ...zstd.EOption) []byte {
	t.Helper()
	e, err := zstd.NewWriter(nil, o...)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	return e.EncodeAll(data, nil)
}

func unzstd(t testing.TB, data []byte) []byte {
	t.Helper()
	d, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	out, err := d.DecodeAll(data, nil)
	if err != nil {
		t.Errorf("decompress: %v", err)
	}
	return out
}

// container is what is kept under d.
func container(t testing.TB, m *mem.Store, d digest.Digest) []byte {
	t.Helper()
	r, err := m.Open(t.Context(), d, 0)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err = errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	return data
}

func wantRead(t testing.TB, s blob.Store, d digest.Digest, want []byte) {
	t.Helper()
	got, err := blob.ReadAll(t.Context(), s, d, d.Size())
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %s: %d bytes, error %v; want the %d bytes of the blob", d, len(got), err, len(want))
	}
}

func TestStore(t *testing.T) {
	blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store {
		return newStore(t, compressed.Options{Store: newInside(t)})
	}})
}

// How blobs are kept, and that they come back at any offset.
func TestForms(t *testing.T) {
	// Its beginning promises what the rest does not keep.
	liar := func(n int) []byte { return append(text(70_000), blobtest.Random(3, n)...) }
	for _, c := range []struct {
		name string
		data []byte
		form byte
	}{
		{"tiny", text(100), 0},
		{"small", text(600), 1},
		{"medium", text(300_000), 1},
		{"one_frame", text(1 << 20), 1},
		{"two_frames", text(1<<20 + 1), 1},
		{"large", text(5<<20 + 12345), 1},
		{"random_small", blobtest.Random(1, 5000), 0},
		{"random_large", blobtest.Random(2, 3<<20), 0},
		{"liar_small", liar(500_000), 0},
		{"liar_large", liar(3 << 20), 0},
		{"liar_later", append(text(1<<20), blobtest.Random(4, 20<<20)...), 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newInside(t)
			s := newStore(t, compressed.Options{Store: m})
			d := blobtest.Put(t, s, digest.SHA256, c.data)
			kept := container(t, m, d)
			if kept[13] != c.form {
				t.Errorf("kept in form %d, want %d", kept[13], c.form)
			}
			if len(kept) > len(c.data)+headerBytes+len(c.data)/10_000 || c.form == 1 && c.name[:4] != "liar" && len(kept) > len(c.data)/2+headerBytes {
				t.Errorf("%d bytes are kept in %d", len(c.data), len(kept))
			}
			if c.form == 1 && !bytes.Equal(unzstd(t, kept), c.data) {
				t.Error("the container is not the blob to others' zstd")
			}
			for _, off := range []int64{0, 1, d.Size() / 3, 1 << 20, d.Size() - 1, d.Size()} {
				if off > d.Size() {
					continue
				}
				r, err := s.Open(t.Context(), d, off)
				if err != nil {
					t.Errorf("open at %d: %v", off, err)
					continue
				}
				got, err := io.ReadAll(r)
				if err = errors.Join(err, r.Close(), r.Close()); err != nil || !bytes.Equal(got, c.data[off:]) {
					t.Errorf("read from %d: %d bytes, error %v; want %d", off, len(got), err, len(c.data[off:]))
				}
			}
			testOpenCompressed(t, s, d, c.data, c.form)
		})
	}
}

func testOpenCompressed(t *testing.T, s *compressed.Store, d digest.Digest, want []byte, form byte) {
	t.Helper()
	r, err := s.OpenCompressed(t.Context(), d)
	if form == 0 {
		if !errors.Is(err, blob.ErrNotCompressed) {
			t.Errorf("OpenCompressed of a raw blob: %v, want ErrNotCompressed", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(unzstd(t, got), want) {
		t.Errorf("%d bytes of zstd are not the blob, error %v", len(got), err)
	}
}

func TestOpenCompressed_absent(t *testing.T) {
	s := newStore(t, compressed.Options{Store: newInside(t)})
	if _, err := s.OpenCompressed(t.Context(), digest.Of(digest.SHA256, []byte("absent"))); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("error %v, want ErrNotFound", err)
	}
	if _, err := s.OpenCompressed(t.Context(), digest.Empty(digest.SHA256)); !errors.Is(err, blob.ErrNotCompressed) {
		t.Errorf("the empty blob: %v, want ErrNotCompressed", err)
	}
}

func TestReceiveCompressed(t *testing.T) {
	skippable := []byte{0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 'j', 'u', 'n', 'k'}
	small, large := text(200_000), text(8<<20)
	half := func(data []byte) []byte {
		return append(zstdOf(t, data[:len(data)/2]), zstdOf(t, data[len(data)/2:])...)
	}
	for _, c := range []struct {
		name   string
		data   []byte
		sent   []byte
		asCame bool
	}{
		{"small", small, zstdOf(t, small), true},
		{"small_without_checksum", small, zstdOf(t, small, zstd.WithEncoderCRC(false)), true},
		{"small_best", small, zstdOf(t, small, zstd.WithEncoderLevel(zstd.SpeedBestCompression)), true},
		{"single_segment", small, zstdOf(t, small, zstd.WithSingleSegment(true)), true},
		{"large", large, zstdOf(t, large, zstd.WithWindowSize(4<<20)), true},
		{"two_frames", small, half(small), false},
		{"skippable_before", small, append(bytes.Clone(skippable), zstdOf(t, small)...), false},
		{"skippable_behind", small, append(zstdOf(t, small), skippable...), false},
		{"empty_frame_behind", small, append(zstdOf(t, small), zstdOf(t, nil, zstd.WithZeroFrames(true))...), false},
		{"does_not_pay", blobtest.Random(1, 200_000), zstdOf(t, blobtest.Random(1, 200_000)), false},
		{"tiny", text(200), zstdOf(t, text(200)), false},
		{"larger_than_memory", blobtest.Random(2, 6<<20), zstdOf(t, blobtest.Random(2, 6<<20)), false},
		{"empty", nil, zstdOf(t, nil, zstd.WithZeroFrames(true)), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newInside(t)
			s := newStore(t, compressed.Options{Store: m})
			d := digest.Of(digest.SHA256, c.data)
			if err := s.ReceiveCompressed(t.Context(), d, bytes.NewReader(c.sent)); err != nil {
				t.Fatal(err)
			}
			wantRead(t, s, d, c.data)
			if d.IsEmpty() {
				return
			}
			if same := bytes.Equal(container(t, m, d)[headerBytes:], c.sent); same != c.asCame {
				t.Errorf("kept as it came: %v, want %v", same, c.asCame)
			}
		})
	}
}

func TestReceiveCompressed_refuses(t *testing.T) {
	broken := errors.New("the line went dead")
	small, large := text(200_000), text(3<<20)
	for _, data := range [][]byte{small, large} {
		d, sent := digest.Of(digest.SHA256, data), zstdOf(t, data)
		other := bytes.Clone(data)
		other[len(other)/2] ^= 1
		for _, c := range []struct {
			name string
			src  io.Reader
			want error
		}{
			{"no_zstd", bytes.NewReader(data), blob.ErrCorrupt},
			{"nothing", bytes.NewReader(nil), blob.ErrCorrupt},
			{"cut", bytes.NewReader(sent[:len(sent)-5]), blob.ErrCorrupt},
			{"other_bytes", bytes.NewReader(zstdOf(t, other)), blob.ErrCorrupt},
			{"shorter", bytes.NewReader(zstdOf(t, data[1:])), blob.ErrCorrupt},
			{"longer", bytes.NewReader(zstdOf(t, append(bytes.Clone(data), 'x'))), blob.ErrCorrupt},
			{"bomb", bytes.NewReader(zstdOf(t, make([]byte, 64<<20))), blob.ErrCorrupt},
			{"garbage_behind", bytes.NewReader(append(bytes.Clone(sent), "garbage"...)), blob.ErrCorrupt},
			{"breaks", io.MultiReader(bytes.NewReader(sent[:len(sent)/2]), failing{broken}), broken},
		} {
			t.Run(fmt.Sprint(c.name, "/", len(data)), func(t *testing.T) {
				s := newStore(t, compressed.Options{Store: newInside(t)})
				if err := s.ReceiveCompressed(t.Context(), d, c.src); !errors.Is(err, c.want) {
					t.Errorf("error %v, want %v", err, c.want)
				}
				if missing, err := s.FindMissing(t.Context(), []digest.Digest{d}); len(missing) != 1 || err != nil {
					t.Errorf("the blob is there, error %v", err)
				}
			})
		}
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// Containers that are not what Create wrote are corrupt, whatever they are.
func TestCorruptContainers(t *testing.T) {
	for _, size := range []int{5000, 2 << 20} {
		data := text(size)
		random := blobtest.Random(1, size)
		for _, c := range []struct {
			name   string
			data   []byte
			tamper func(b []byte) []byte
		}{
			{"magic", data, func(b []byte) []byte { b[0] ^= 1; return b }},
			{"version", data, func(b []byte) []byte { b[12]++; return b }},
			{"form", data, func(b []byte) []byte { b[13] = 7; return b }},
			{"reserved", data, func(b []byte) []byte { b[15] = 1; return b }},
			{"size", data, func(b []byte) []byte { b[16] ^= 1; return b }},
			{"other_form", data, func(b []byte) []byte { b[13] ^= 1; return b }},
			{"other_form_raw", random, func(b []byte) []byte { b[13] ^= 1; return b }},
			{"cut", data, func(b []byte) []byte { return b[:len(b)-2] }},
			{"cut_raw", random, func(b []byte) []byte { return b[:len(b)-2] }},
			{"head_only", data, func(b []byte) []byte { return b[:headerBytes] }},
			{"less_than_a_head", data, func(b []byte) []byte { return b[:headerBytes-1] }},
			{"nothing", data, func([]byte) []byte { return nil }},
			{"the_blob_itself", data, func([]byte) []byte { return data }},
		} {
			t.Run(fmt.Sprint(c.name, "/", size), func(t *testing.T) {
				m := newInside(t)
				s := newStore(t, compressed.Options{Store: m})
				d := blobtest.Put(t, s, digest.SHA256, c.data)
				bad := c.tamper(container(t, m, d))
				if err := m.Remove(t.Context(), d); err != nil {
					t.Fatal(err)
				}
				w, err := m.Create(t.Context(), d)
				if err != nil {
					t.Fatal(err)
				}
				_, err = w.Write(bad)
				if err := errors.Join(err, w.Commit(), w.Close()); err != nil {
					t.Fatal(err)
				}
				got, err := blob.ReadAll(t.Context(), s, d, d.Size())
				if !errors.Is(err, blob.ErrCorrupt) && (err != nil || digest.Of(digest.SHA256, got) == d) {
					t.Errorf("read %d bytes, error %v, want ErrCorrupt, or bytes that are not the blob's", len(got), err)
				}
				if err := s.Check(t.Context(), d); !errors.Is(err, blob.ErrCorrupt) {
					t.Errorf("check: %v, want ErrCorrupt", err)
				}
				if missing, err := s.FindMissing(t.Context(), []digest.Digest{d}); len(missing) != 1 || err != nil {
					t.Errorf("the corrupt container is there, error %v", err)
				}
			})
		}
	}
}

// Not more blobs than allowed have a window, and who waits can give up.
func TestMaxReaders(t *testing.T) {
	s := newStore(t, compressed.Options{Store: newInside(t), MaxReaders: 1})
	data := text(3 << 20)
	d := blobtest.Put(t, s, digest.SHA256, data)
	r, err := s.Open(t.Context(), d, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Open(ctx, d, 5); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want Canceled", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		wantRead(t, s, d, data)
	}()
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	<-done
}

func TestNew(t *testing.T) {
	plain, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]compressed.Options{
		"no store":          {},
		"no containers":     {Store: plain},
		"no ability":        {Store: struct{ blob.Store }{newInside(t)}},
		"negative size":     {Store: newInside(t), MinBytes: -1},
		"negative saving":   {Store: newInside(t), MinSaving: -1},
		"negative decoders": {Store: newInside(t), MaxReaders: -1},
	} {
		if _, err := compressed.New(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	s := newStore(t, compressed.Options{Store: newInside(t), Registerer: reg})
	d := blobtest.Put(t, s, digest.SHA256, text(100_000))
	wantRead(t, s, d, text(100_000))
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, error %v", problems, err)
	}
	if len(families) != 4 {
		t.Errorf("%d families, want 4", len(families))
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if families, err := reg.Gather(); err != nil || len(families) > 0 {
		t.Errorf("%d families are left, error %v", len(families), err)
	}
}
