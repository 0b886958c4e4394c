package observed_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/blob/observed"
	"github.com/mettle-build/mettle/elan/digest"
)

type both struct {
	*observed.Store
	*observed.Entries
}

func newMem(t testing.TB) *mem.Store {
	t.Helper()
	m, err := mem.New(mem.Options{MaxBytes: 300 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func newObserver(t testing.TB, o observed.Options) *observed.Observer {
	t.Helper()
	ob, err := observed.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ob.Close)
	return ob
}

func TestStore(t *testing.T) {
	blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store {
		m, ob := newMem(t), newObserver(t, observed.Options{})
		return both{ob.Store("m", m), ob.Entries("m", m)}
	}})
}

// counts are the counters of a registry, without those that are 0, and the
// number of observations of the histograms.
func counts(t testing.TB, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, error %v", problems, err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			name := []string{strings.TrimPrefix(f.GetName(), "elan_store_")}
			for _, l := range m.Label {
				if l.GetName() != "store" {
					name = append(name, l.GetValue())
				}
			}
			v := m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			if v != 0 {
				got[strings.Join(name, " ")] = v
			}
		}
	}
	return got
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	ob := newObserver(t, observed.Options{Registerer: reg})
	m := newMem(t)
	var fault error
	s := ob.Store("m", blobtest.Faulty{Store: m, Fault: func(blobtest.Op, digest.Digest) error { return fault }})
	e := ob.Entries("m", m)
	ctx := t.Context()
	want := map[string]float64{}
	step := func(name string, changes map[string]float64) {
		t.Helper()
		maps.Copy(want, changes)
		if diff := cmp.Diff(want, counts(t, reg)); diff != "" {
			t.Errorf("after %s, -want +got:\n%s", name, diff)
		}
	}
	data := []byte("twelve bytes")
	d := blobtest.Put(t, s, digest.SHA256, data)
	step("a write", map[string]float64{"calls_total write ok": 1, "call_seconds write": 1, "bytes_total written": 12})

	absent := digest.Of(digest.SHA256, []byte("absent"))
	if _, err := s.FindMissing(ctx, []digest.Digest{d, absent, d}); err != nil {
		t.Error(err)
	}
	step("find", map[string]float64{"calls_total find ok": 1, "call_seconds find": 1, "found_total there": 2, "found_total missing": 1})

	if _, err := blob.ReadAll(ctx, s, d, 100); err != nil {
		t.Error(err)
	}
	step("a read", map[string]float64{"calls_total open ok": 1, "call_seconds open": 1, "calls_total read ok": 1, "bytes_total read": 12})

	if _, err := s.Open(ctx, absent, 0); !errors.Is(err, blob.ErrNotFound) {
		t.Error(err)
	}
	step("a miss", map[string]float64{"calls_total open not_found": 1, "call_seconds open": 2})

	w, err := s.Create(ctx, absent)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write([]byte("abs"))
	if err := errors.Join(err, w.Close(), w.Close()); err != nil {
		t.Error(err)
	}
	step("a write given up", map[string]float64{"calls_total write abandoned": 1, "bytes_total written": 15})

	for i, c := range []struct {
		err     error
		outcome string
	}{{blob.ErrUnavailable, "unavailable"}, {blob.ErrFull, "full"}, {errors.New("x"), "error"}, {blob.ErrCorrupt, "corrupt"}, {blob.ErrTooLarge, "too_large"}} {
		fault = fmt.Errorf("wrapped: %w", c.err)
		if _, err := s.Create(ctx, absent); !errors.Is(err, c.err) {
			t.Errorf("Create: %v, want the store's %v", err, c.err)
		}
		step(c.outcome, map[string]float64{"calls_total write " + c.outcome: 1, "call_seconds write": float64(2 + i)})
	}
	fault = nil

	k := blob.EntryKey{Action: d}
	_, err = e.Entry(ctx, k)
	if !errors.Is(err, blob.ErrNotFound) {
		t.Error(err)
	}
	if err := errors.Join(e.PutEntry(ctx, k, []byte("abc")), e.DeleteEntry(ctx, k)); err != nil {
		t.Error(err)
	}
	step("entries", map[string]float64{
		"calls_total entry not_found": 1, "call_seconds entry": 1, "calls_total put_entry ok": 1, "call_seconds put_entry": 1,
		"calls_total delete_entry ok": 1, "call_seconds delete_entry": 1, "bytes_total written": 18,
	})
	ob.Close()
	if families, err := reg.Gather(); len(families) > 0 || err != nil {
		t.Errorf("%d families after Close, error %v", len(families), err)
	}
}

// A read that breaks in the middle is told from one that did not.
func TestMetrics_brokenRead(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	ob := newObserver(t, observed.Options{Registerer: reg})
	s := ob.Store("m", blobtest.Faulty{Store: newMem(t), Fault: func(op blobtest.Op, _ digest.Digest) error {
		if op == blobtest.OpRead {
			return blob.ErrCorrupt
		}
		return nil
	}})
	d := blobtest.Put(t, s, digest.SHA256, []byte("x"))
	r, err := s.Open(t.Context(), d, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(r); !errors.Is(err, blob.ErrCorrupt) {
		t.Error(err)
	}
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		t.Error(err)
	}
	if n := counts(t, reg)["calls_total read corrupt"]; n != 1 {
		t.Errorf("%v corrupt reads, want 1", n)
	}
}

func TestAbilities(t *testing.T) {
	ob := newObserver(t, observed.Options{})
	s := ob.Store("m", linking{newMem(t)})
	if _, ok := blob.As[blob.Linker](s); !ok {
		t.Error("the store links, and the observed one does not")
	}
	w, err := ob.Store("m", showing{newMem(t)}).Create(t.Context(), digest.Of(digest.SHA256, []byte("x")))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := w.(io.ReaderAt); !ok {
		t.Error("the writer shows what was written, and the observed one does not")
	}
	_ = w.Close()
}

type linking struct{ blob.Store }

func (linking) Link(_ context.Context, _ digest.Digest, _ string, _ blob.LinkMode) error { return nil }

type showing struct{ blob.Store }

func (s showing) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	w, err := s.Store.Create(ctx, d)
	return struct {
		blob.Writer
		io.ReaderAt
	}{w, strings.NewReader("")}, err
}

func TestLogs(t *testing.T) {
	var out bytes.Buffer
	ob := newObserver(t, observed.Options{Logger: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	d := blobtest.Put(t, ob.Store("m", newMem(t)), digest.SHA256, []byte("x"))
	if got := out.String(); !strings.Contains(got, "store=m call=write digest="+d.String()) {
		t.Errorf("log %q", got)
	}
}

func TestNew_registersOnce(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	newObserver(t, observed.Options{Registerer: reg})
	if _, err := observed.New(observed.Options{Registerer: reg}); err == nil {
		t.Error("a second observer of one registry: no error")
	}
}

func BenchmarkOpen(b *testing.B) {
	m := newMem(b)
	d := blobtest.Put(b, m, digest.SHA256, blobtest.Random(1, 4<<10))
	for name, s := range map[string]blob.Store{"bare": m, "observed": newObserver(b, observed.Options{}).Store("m", m)} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r, err := s.Open(b.Context(), d, 0)
				if err != nil {
					b.Fatal(err)
				}
				_ = r.Close()
			}
		})
	}
}
