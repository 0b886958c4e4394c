package tiered_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/blob/tiered"
	"github.com/mettle-build/mettle/elan/digest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newMem(t testing.TB, o mem.Options) *mem.Store {
	t.Helper()
	if o.MaxBytes == 0 {
		o.MaxBytes = 300 << 20
	}
	s, err := mem.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newFile(t testing.TB) *file.Store {
	t.Helper()
	s, err := file.New(file.Options{Dir: filepath.Join(t.TempDir(), "store"), MinFreeBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func newTiered(t testing.TB, o tiered.Options) blob.Store {
	t.Helper()
	s, err := tiered.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// spy is a tier whose calls are counted, and can be made to do otherwise. The
// hooks are set before the calls that they are for.
type spy struct {
	*mem.Store
	mu    sync.Mutex
	calls map[blobtest.Op]int
	asked []digest.Digest // by FindMissing
	hook  func(ctx context.Context, op blobtest.Op) error
	body  func(d digest.Digest, r io.ReadCloser) io.ReadCloser // what Open returns
}

func newSpy(t testing.TB) *spy {
	return &spy{Store: newMem(t, mem.Options{}), calls: map[blobtest.Op]int{}}
}

func (s *spy) set(hook func(ctx context.Context, op blobtest.Op) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hook = hook
}

// fail makes the ops fail, or all calls if there are none.
func (s *spy) fail(err error, ops ...blobtest.Op) {
	s.set(func(_ context.Context, op blobtest.Op) error {
		if len(ops) == 0 || slices.Contains(ops, op) {
			return err
		}
		return nil
	})
}

func (s *spy) call(ctx context.Context, op blobtest.Op) error {
	s.mu.Lock()
	s.calls[op]++
	hook := s.hook
	s.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(ctx, op)
}

// told are the digests that FindMissing was asked about.
func (s *spy) told() []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

func (s *spy) count(op blobtest.Op) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[op]
}

func (s *spy) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	s.mu.Lock()
	s.asked = append(s.asked, ds...)
	s.mu.Unlock()
	if err := s.call(ctx, blobtest.OpFind); err != nil {
		return nil, err
	}
	return s.Store.FindMissing(ctx, ds)
}

func (s *spy) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if err := s.call(ctx, blobtest.OpOpen); err != nil {
		return nil, err
	}
	r, err := s.Store.Open(ctx, d, offset)
	if err == nil && s.body != nil {
		return s.body(d, r), nil
	}
	return r, err
}

func (s *spy) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	if err := s.call(ctx, blobtest.OpCreate); err != nil {
		return nil, err
	}
	w, err := s.Store.Create(ctx, d)
	return &spyWriter{Writer: w, s: s}, err
}

type spyWriter struct {
	blob.Writer
	s *spy
}

func (w *spyWriter) Write(p []byte) (int, error) {
	if err := w.s.call(context.Background(), blobtest.OpWrite); err != nil {
		return 0, err
	}
	return w.Writer.Write(p)
}

func (w *spyWriter) Commit() error {
	if err := w.s.call(context.Background(), blobtest.OpCommit); err != nil {
		return err
	}
	return w.Writer.Commit()
}

// body is a reader of other bytes than the blob's, or of a blob that breaks off.
type body struct {
	io.Reader
	io.Closer
}

// flipped changes one byte at off.
func flipped(off int) func(digest.Digest, io.ReadCloser) io.ReadCloser {
	return func(_ digest.Digest, r io.ReadCloser) io.ReadCloser {
		data, _ := io.ReadAll(r)
		data[off] ^= 1
		return body{bytes.NewReader(data), r}
	}
}

// cut ends after n bytes, with err.
func cut(n int64, err error) func(digest.Digest, io.ReadCloser) io.ReadCloser {
	return func(_ digest.Digest, r io.ReadCloser) io.ReadCloser {
		return body{io.MultiReader(io.LimitReader(r, n), errReader{err}), r}
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

// two is an upper tier and an authority.
type two struct {
	up, low *spy
	s       blob.Store
	reg     *prometheus.Registry
}

func newTwo(t testing.TB, change func(o *tiered.Options)) *two {
	t.Helper()
	v := &two{up: newSpy(t), low: newSpy(t), reg: prometheus.NewPedanticRegistry()}
	o := tiered.Options{Tiers: []tiered.Tier{{Name: "up", Store: v.up}, {Name: "low", Store: v.low}}, Registerer: v.reg}
	if change != nil {
		change(&o)
	}
	v.s = newTiered(t, o)
	return v
}

func put(t testing.TB, c blob.Creator, data []byte) digest.Digest {
	t.Helper()
	return blobtest.Put(t, c, digest.SHA256, data)
}

func wantRead(t testing.TB, o blob.Opener, d digest.Digest, want []byte) {
	t.Helper()
	got, err := blob.ReadAll(t.Context(), o, d, d.Size())
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %s: %d bytes, error %v; want the %d bytes of the blob", d, len(got), err, len(want))
	}
}

func wantErr(t testing.TB, o blob.Opener, d digest.Digest, want error) {
	t.Helper()
	if _, err := blob.ReadAll(t.Context(), o, d, d.Size()); !errors.Is(err, want) {
		t.Errorf("read %s: error %v, want %v", d, err, want)
	}
}

func has(t testing.TB, f blob.Finder, d digest.Digest) bool {
	t.Helper()
	missing, err := f.FindMissing(t.Context(), []digest.Digest{d})
	if err != nil {
		t.Fatal(err)
	}
	return len(missing) == 0
}

// sizes are those of a blob that is fetched whole, and of one that streams.
func sizes() map[string]int {
	return map[string]int{"small": 100_000, "large": tiered.WholeBytes*3 + 5}
}

// bodied is a tier whose blobs come in another way.
type bodied struct {
	*spy
	way func(io.Reader) io.Reader
}

func (b bodied) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := b.spy.Open(ctx, d, offset)
	if err != nil {
		return nil, err
	}
	return body{b.way(r), r}, nil
}

// readable is a tier whose writers show what was written, as those of files do.
type readable struct{ *spy }

func (r readable) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	w, err := r.spy.Create(ctx, d)
	return &readableWriter{Writer: w}, err
}

type readableWriter struct {
	blob.Writer
	mu   sync.Mutex
	data []byte
}

func (w *readableWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.data = append(w.data, p...)
	return w.Writer.Write(p)
}

func (w *readableWriter) ReadAt(p []byte, off int64) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return bytes.NewReader(w.data).ReadAt(p, off)
}

// discard takes any blob and keeps none: a way to compute digests.
type discard struct{}

func (discard) Create(context.Context, digest.Digest) (blob.Writer, error) { return discard{}, nil }
func (discard) Write(p []byte) (int, error)                                { return len(p), nil }
func (discard) Commit() error                                              { return nil }
func (discard) Close() error                                               { return nil }
