package tiered_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/blob/tiered"
	"github.com/mettle-build/mettle/elan/digest"
)

func TestStore(t *testing.T) {
	for name, tiers := range map[string]func(t testing.TB) []tiered.Tier{
		"mem_file_mem": func(t testing.TB) []tiered.Tier {
			return []tiered.Tier{
				{Name: "up", Store: newMem(t, mem.Options{}), MaxBlobBytes: 300_000, Trusted: true},
				{Name: "disk", Store: newFile(t)},
				{Name: "low", Store: newMem(t, mem.Options{})},
			}
		},
		// A tier that has no room for anything changes nothing.
		"tiny_mem": func(t testing.TB) []tiered.Tier {
			return []tiered.Tier{
				{Name: "up", Store: newMem(t, mem.Options{MaxBytes: 1000})},
				{Name: "low", Store: newMem(t, mem.Options{})},
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			blobtest.Run(t, blobtest.Options{FindDigests: 2000, New: func(t testing.TB) blob.Store {
				return newTiered(t, tiered.Options{Tiers: tiers(t)})
			}})
		})
	}
}

// An alert asks for the increase of what is damaged, which takes a series from the start.
func TestNew_countsCorruptFromZero(t *testing.T) {
	reg := prometheus.NewRegistry()
	newTiered(t, tiered.Options{Registerer: reg, Tiers: []tiered.Tier{
		{Name: "up", Store: newMem(t, mem.Options{})}, {Name: "low", Store: newMem(t, mem.Options{})},
	}})
	if n, err := testutil.GatherAndCount(reg, "elan_tiered_corrupt_total"); err != nil || n != 1 {
		t.Errorf("got %d series, %v, want that of the upper tier", n, err)
	}
}

// What the authority has is in all tiers that take it once it was read.
func TestOpen_fillsUpwards(t *testing.T) {
	for name, size := range sizes() {
		for _, offset := range []int64{0, 77} {
			t.Run(name, func(t *testing.T) {
				first, low, disk := newSpy(t), newSpy(t), newFile(t)
				s := newTiered(t, tiered.Options{Tiers: []tiered.Tier{
					{Name: "first", Store: first, MaxBlobBytes: tiered.WholeBytes, Trusted: true},
					{Name: "disk", Store: disk},
					{Name: "low", Store: low},
				}})
				data := blobtest.Random(1, size)
				d := put(t, low, data)
				r, err := s.Open(t.Context(), d, offset)
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(r)
				if err = errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, data[offset:]) {
					t.Errorf("read %d bytes, error %v", len(got), err)
				}
				await(t, func() bool { return has(t, disk, d) })
				if size <= tiered.WholeBytes {
					await(t, func() bool { return has(t, first, d) })
				}
				// From now on without the authority.
				low.fail(blob.ErrUnavailable, blobtest.OpOpen)
				wantRead(t, s, d, data)
				// And from the disk to the memory.
				_ = first.Remove(t.Context(), d)
				wantRead(t, s, d, data)
			})
		}
	}
}

// await waits for what happens behind the caller's back.
func await(t testing.TB, done func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !done(); {
		if time.Now().After(end) {
			t.Fatal("it does not happen")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestFindMissing_isTheAuthoritys(t *testing.T) {
	v := newTwo(t, nil)
	d := put(t, v.up, []byte("only above"))
	if has(t, v.s, d) {
		t.Error("a blob is there that only an upper tier has")
	}
	v.low.fail(blob.ErrUnavailable, blobtest.OpFind)
	if _, err := v.s.FindMissing(t.Context(), []digest.Digest{d}); !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("without the authority: %v, want ErrUnavailable", err)
	}
}

func TestAuthorityDown(t *testing.T) {
	for name, size := range sizes() {
		t.Run(name, func(t *testing.T) {
			v := newTwo(t, nil)
			data := blobtest.Random(1, size)
			d, other := put(t, v.s, data), put(t, v.low, append(data, 'x'))
			v.low.fail(blob.ErrUnavailable)
			wantRead(t, v.s, d, data)
			// What no upper tier has is not missing, but can't be told.
			wantErr(t, v.s, other, blob.ErrUnavailable)
			if err := blob.ReceiveBytes(t.Context(), v.s, other, append(data, 'x')); !errors.Is(err, blob.ErrUnavailable) {
				t.Errorf("write: %v, want ErrUnavailable", err)
			}
			v.low.fail(nil)
			wantRead(t, v.s, other, append(data, 'x'))
		})
	}
}

// A write is acknowledged by the authority, and by no other.
func TestCreate(t *testing.T) {
	data := blobtest.Random(1, 100_000)
	d := digest.Of(digest.SHA256, data)
	for _, op := range []blobtest.Op{blobtest.OpCreate, blobtest.OpWrite, blobtest.OpCommit} {
		t.Run("upper_fails/"+string(op), func(t *testing.T) {
			v := newTwo(t, nil)
			v.up.fail(blob.ErrFull, op)
			put(t, v.s, data)
			if !has(t, v.low, d) || has(t, v.up.Store, d) {
				t.Error("the blob is not in the authority alone")
			}
			v.up.fail(nil)
			wantRead(t, v.s, d, data)
		})
		t.Run("authority_fails/"+string(op), func(t *testing.T) {
			v := newTwo(t, nil)
			v.low.fail(blob.ErrFull, op)
			if err := blob.Receive(t.Context(), v.s, d, bytes.NewReader(data)); !errors.Is(err, blob.ErrFull) {
				t.Errorf("error %v, want the authority's", err)
			}
			if has(t, v.up.Store, d) {
				t.Error("an upper tier has what was not acknowledged")
			}
		})
	}
	t.Run("both", func(t *testing.T) {
		v := newTwo(t, nil)
		put(t, v.s, data)
		if !has(t, v.low, d) || !has(t, v.up.Store, d) {
			t.Error("the blob is not in both tiers")
		}
	})
}

// The upper tier has other bytes under the blob's name.
func TestOpen_corruptUpperCopy(t *testing.T) {
	t.Run("small", func(t *testing.T) {
		v := newTwo(t, nil)
		data := blobtest.Random(1, 50_000)
		d := put(t, v.s, data)
		v.up.body = flipped(49_999)
		wantRead(t, v.s, d, data) // not a wrong byte
		v.up.body = nil
		await(t, func() bool { return has(t, v.up.Store, d) })
		opens := v.low.count(blobtest.OpOpen)
		wantRead(t, v.s, d, data)
		if n := v.low.count(blobtest.OpOpen); n != opens {
			t.Error("the sound copy did not come up")
		}
	})
	t.Run("large", func(t *testing.T) {
		v := newTwo(t, nil)
		data := blobtest.Random(1, tiered.WholeBytes*2)
		d := put(t, v.s, data)
		v.up.body = flipped(5)
		// Much was sent when it is found out: the reader must not get all of it.
		wantErr(t, v.s, d, blob.ErrCorrupt)
		if has(t, v.up.Store, d) {
			t.Error("the corrupt copy is there still")
		}
		v.up.body = nil
		wantRead(t, v.s, d, data)
		if !has(t, v.up.Store, d) {
			t.Error("the sound copy did not come up")
		}
	})
	for name, err := range map[string]error{"ends": io.EOF, "fails": errors.New("bad sector"), "says_so": blob.ErrCorrupt} {
		for sizeName, size := range sizes() {
			t.Run(sizeName+"_"+name+"_in_the_middle", func(t *testing.T) {
				v := newTwo(t, nil)
				data := blobtest.Random(1, size)
				d := put(t, v.s, data)
				v.up.body = cut(int64(size/2), err)
				wantRead(t, v.s, d, data)
				if kept := has(t, v.up.Store, d); kept && name != "fails" && size > tiered.WholeBytes {
					t.Error("the corrupt copy is there still")
				}
			})
		}
	}
}

func TestOpen_authorityFails(t *testing.T) {
	trouble := errors.New("trouble")
	for sizeName, size := range sizes() {
		for _, c := range []struct {
			name string
			body func(digest.Digest, io.ReadCloser) io.ReadCloser
			want error
		}{
			{"in_the_middle", cut(int64(size/2), trouble), trouble},
			{"truncated", cut(int64(size-1), io.EOF), blob.ErrCorrupt},
			{"flipped", flipped(size - 1), blob.ErrCorrupt},
		} {
			t.Run(sizeName+"/"+c.name, func(t *testing.T) {
				for _, disk := range []bool{false, true} { // readable while it is filled, or not
					v := newTwo(t, func(o *tiered.Options) {
						if disk {
							o.Tiers[0].Store = newFile(t)
						}
					})
					data := blobtest.Random(1, size)
					d := put(t, v.low, data)
					v.low.body = c.body
					wantErr(t, v.s, d, c.want)
					v.low.body = nil
					wantRead(t, v.s, d, data)
				}
			})
		}
	}
}

func TestOpen_upperTierFull(t *testing.T) {
	for name, size := range sizes() {
		for _, op := range []blobtest.Op{blobtest.OpCreate, blobtest.OpWrite, blobtest.OpCommit} {
			t.Run(name+"/"+string(op), func(t *testing.T) {
				v := newTwo(t, nil)
				data := blobtest.Random(1, size)
				d := put(t, v.low, data)
				v.up.fail(blob.ErrFull, op)
				wantRead(t, v.s, d, data)
				wantRead(t, v.s, d, data)
			})
		}
	}
}

func TestRemove(t *testing.T) {
	for name, size := range sizes() {
		t.Run(name, func(t *testing.T) {
			v := newTwo(t, nil)
			r, ok := blob.As[blob.Remover](v.s)
			if !ok {
				t.Fatal("the authority removes, and the tiers do not")
			}
			data := blobtest.Random(1, size)
			d := put(t, v.s, data)
			if err := r.Remove(t.Context(), d); err != nil {
				t.Error(err)
			}
			wantErr(t, v.s, d, blob.ErrNotFound)
			if err := r.Remove(t.Context(), d); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("remove again: %v, want ErrNotFound", err)
			}
			put(t, v.up, data)
			if err := r.Remove(t.Context(), d); err != nil {
				t.Errorf("remove what only an upper tier has: %v", err)
			}
			wantErr(t, v.s, d, blob.ErrNotFound)
		})
	}
}

// A blob is removed while it is on its way up.
func TestRemove_inFlight(t *testing.T) {
	for name, size := range sizes() {
		t.Run(name, func(t *testing.T) {
			v := newTwo(t, nil)
			data := blobtest.Random(1, size)
			d := put(t, v.low, data)
			reading, goOn := make(chan struct{}), make(chan struct{})
			var once sync.Once
			v.low.set(func(_ context.Context, op blobtest.Op) error {
				if op == blobtest.OpOpen {
					once.Do(func() { close(reading) })
					<-goOn
				}
				return nil
			})
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = blob.ReadAll(t.Context(), v.s, d, d.Size())
			}()
			<-reading
			r, _ := blob.As[blob.Remover](v.s)
			// The reader has the blob open already, so that only the tiers can keep it.
			if err := r.Remove(t.Context(), d); err != nil {
				t.Error(err)
			}
			put(t, v.low.Store, data)
			close(goOn)
			<-done
			v.low.set(nil)
			_ = v.low.Remove(t.Context(), d)
			wantErr(t, v.s, d, blob.ErrNotFound)
		})
	}
}

func TestNew(t *testing.T) {
	a, b := newMem(t, mem.Options{}), newMem(t, mem.Options{})
	ok := []tiered.Tier{{Name: "a", Store: a}, {Name: "b", Store: b}}
	for name, o := range map[string]tiered.Options{
		"none":            {},
		"one":             {Tiers: ok[:1]},
		"no store":        {Tiers: []tiered.Tier{{Name: "a"}, ok[1]}},
		"no name":         {Tiers: []tiered.Tier{{Store: a}, ok[1]}},
		"same name":       {Tiers: []tiered.Tier{ok[0], ok[0]}},
		"negative bound":  {Tiers: []tiered.Tier{{Name: "a", Store: a, MaxBlobBytes: -1}, ok[1]}},
		"negative window": {Tiers: ok, TouchEvery: -1},
		"negative fills":  {Tiers: ok, MaxFills: -1},
		"negative memory": {Tiers: ok, MaxFillBytes: -1},
	} {
		if _, err := tiered.New(t.Context(), o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestMetrics(t *testing.T) {
	v := newTwo(t, nil)
	d := put(t, v.low, []byte("x"))
	wantRead(t, v.s, d, []byte("x"))
	await(t, func() bool { return has(t, v.up.Store, d) })
	// The copy is there before it is known to be: a read may still join the first.
	reads, got := 1.0, map[string]float64{}
	await(t, func() bool {
		wantRead(t, v.s, d, []byte("x"))
		reads++
		got = counters(t, v.reg)
		return got["elan_tiered_reads_total up"] > 0
	})
	if low, up := got["elan_tiered_reads_total low"], got["elan_tiered_reads_total up"]; up != 1 || low != reads-1 {
		t.Errorf("%v reads from low and %v from up, want %v and 1; all: %v", low, up, reads-1, got)
	}
	families, err := v.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, error %v", problems, err)
	}
}

// counters are the values of all counters, by name and labels.
func counters(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			key := f.GetName()
			for _, l := range m.Label {
				key += " " + l.GetValue()
			}
			all[key] = m.GetCounter().GetValue()
		}
	}
	return all
}
