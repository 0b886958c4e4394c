package pack_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file/pack"
)

func open(t testing.TB, o pack.Options) *pack.Store {
	t.Helper()
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	s, err := pack.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, s.Close()) })
	s.SetSync(func(int) error { return nil }) // disks that others use are slow
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func key(n int) []byte { return fmt.Appendf(nil, "key %d", n) }

// value is what the record n has, of some hundred bytes.
func value(n int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "value %d ", n), 1+n%40)
}

func put(t testing.TB, s *pack.Store, ns ...int) {
	t.Helper()
	for _, n := range ns {
		_, err := s.Put(pack.Record{Key: key(n), Value: value(n)})
		must(t, err)
	}
}

func wantValue(t testing.TB, s *pack.Store, k, want []byte) {
	t.Helper()
	got, err := s.Get(t.Context(), k)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s: %.40q, %v; want %.40q", k, got, err, want)
	}
	if ok, err := s.Find(t.Context(), k); !ok || err != nil {
		t.Errorf("find %s: %v, %v", k, ok, err)
	}
}

func wantGone(t testing.TB, s *pack.Store, k []byte) {
	t.Helper()
	if v, err := s.Get(t.Context(), k); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("%s: %.40q, %v; want ErrNotFound", k, v, err)
	}
	if ok, err := s.Find(t.Context(), k); ok || err != nil {
		t.Errorf("find %s: %v, %v; want it gone", k, ok, err)
	}
}

func upTo(n int) []int {
	ns := make([]int, n)
	for i := range ns {
		ns[i] = i
	}
	return ns
}

// TestStore_model drives a store at random, with starts of every kind between,
// and compares it with a map.
func TestStore_model(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		m := &model{t: t, o: pack.Options{Dir: t.TempDir(), SegmentBytes: 4 << 10}, want: map[string][]byte{}}
		m.reopen(false)
		defer func() { must(t, m.s.Close()) }()
		numbers := rapid.IntRange(0, 30)
		rt.Repeat(map[string]func(*rapid.T){
			"put": func(rt *rapid.T) {
				n := numbers.Draw(rt, "n")
				put(t, m.s, n)
				m.want[string(key(n))] = value(n)
			},
			"put_many": func(rt *rapid.T) {
				var rs []pack.Record
				for _, n := range rapid.SliceOfN(numbers, 1, 9).Draw(rt, "ns") {
					rs = append(rs, pack.Record{Key: key(n), Value: value(n)})
					m.want[string(key(n))] = value(n)
				}
				_, err := m.s.Put(rs...)
				must(t, err)
			},
			"put_mutable": func(rt *rapid.T) {
				k := "mutable " + string(key(numbers.Draw(rt, "n")))
				m.want[k] = value(rapid.IntRange(0, 1000).Draw(rt, "value"))
				_, err := m.s.Put(pack.Record{Key: []byte(k), Value: m.want[k], Mutable: true})
				must(t, err)
			},
			"delete": func(rt *rapid.T) {
				k := string(key(numbers.Draw(rt, "n")))
				if rapid.Bool().Draw(rt, "mutable") {
					k = "mutable " + k
				}
				_, had := m.want[k]
				if ok, err := m.s.Delete(t.Context(), []byte(k)); err != nil || ok != had {
					rt.Fatalf("delete %s: %v, %v; want %v", k, ok, err, had)
				}
				delete(m.want, k)
			},
			"clean": func(rt *rapid.T) {
				_, _, err := m.s.Clean(t.Context().Done(), rapid.Int64Range(1, 1<<16).Draw(rt, "need"), rapid.Float64Range(0, 1).Draw(rt, "live"), time.Time{})
				must(t, err)
			},
			"restart":    func(*rapid.T) { m.reopen(false) },
			"power_loss": func(*rapid.T) { m.reopen(true) },
			"torn_tail": func(rt *rapid.T) {
				m.tear(rapid.IntRange(1, 700).Draw(rt, "bytes"))
				m.reopen(rapid.Bool().Draw(rt, "untrusted"))
			},
			"": func(rt *rapid.T) { m.check(rt) },
		})
	})
}

type model struct {
	t    *testing.T
	o    pack.Options
	s    *pack.Store
	want map[string][]byte
}

func (m *model) reopen(untrusted bool) {
	if m.s != nil {
		must(m.t, m.s.Close())
	}
	var err error
	o := m.o
	o.Untrusted = untrusted
	m.s, err = pack.New(o)
	must(m.t, err)
	m.s.SetSync(func(int) error { return nil })
}

// tear adds the beginning of a record to the last segment, as one has that was
// being written when the process died, and some zeros.
func (m *model) tear(n int) {
	b := m.s.AppendRecord(nil, pack.Record{Key: key(0), Value: bytes.Repeat([]byte("wrong"), 200)})[:n]
	segs := segmentFiles(m.t, m.o.Dir)
	if len(segs) == 0 {
		return
	}
	f, err := os.OpenFile(segs[len(segs)-1], os.O_APPEND|os.O_WRONLY, 0)
	must(m.t, err)
	_, err = f.Write(append(b, make([]byte, 100)...))
	must(m.t, errors.Join(err, f.Close()))
}

func (m *model) check(rt *rapid.T) {
	for n := range 31 {
		for _, k := range []string{string(key(n)), "mutable " + string(key(n))} {
			v, err := m.s.Get(m.t.Context(), []byte(k))
			want, ok := m.want[k]
			if ok && (err != nil || !bytes.Equal(v, want)) || !ok && !errors.Is(err, blob.ErrNotFound) {
				rt.Fatalf("%s: %.40q, %v; want %.40q, %v", k, v, err, want, ok)
			}
		}
	}
	if n := m.s.Records(); n != int64(len(m.want)) {
		rt.Fatalf("%d records, want %d", n, len(m.want))
	}
	seen := map[string][]byte{}
	for i, err := range m.s.All(m.t.Context()) {
		must(m.t, err)
		seen[string(i.Key)] = bytes.Clone(i.Value)
	}
	if !maps.EqualFunc(m.want, seen, bytes.Equal) {
		rt.Fatalf("All: -want +got:\n%s", cmp.Diff(m.want, seen))
	}
}

func segmentFiles(t testing.TB, dir string) []string {
	t.Helper()
	segs, err := filepath.Glob(dir + "/*.seg")
	must(t, err)
	return segs
}

// TestStore_concurrent: readers, writers and cleaners at once; nobody misses
// what is there, and nobody sees what is not.
func TestStore_concurrent(t *testing.T) {
	s := open(t, pack.Options{SegmentBytes: 16 << 10})
	const all = 2000
	put(t, s, upTo(all/2)...)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(w)))
			for i := range all / 2 {
				put(t, s, all/2+i)
				n := r.IntN(all / 2)
				wantValue(t, s, key(n), value(n))
				k := fmt.Appendf(nil, "own of %d", w)
				_, err := s.Put(pack.Record{Key: k, Value: value(i), Mutable: true})
				if err != nil {
					t.Error(err)
				}
				wantValue(t, s, k, value(i))
			}
		})
	}
	wg.Go(func() {
		for range 20 {
			if _, _, err := s.Clean(t.Context().Done(), 1<<20, 0.95, time.Time{}); err != nil {
				t.Error(err)
			}
			if v, err := s.Verify(t.Context().Done(), noPace); err != nil || v.Damaged > 0 {
				t.Errorf("verify: %+v, %v", v, err)
			}
		}
	})
	wg.Wait()
	for n := range all {
		wantValue(t, s, key(n), value(n))
	}
}

func noPace(int64) error { return nil }

// TestStore_bytes: what is told of the sizes is what the files have.
func TestStore_bytes(t *testing.T) {
	dir, told := t.TempDir(), int64(0)
	s := open(t, pack.Options{Dir: dir, SegmentBytes: 8 << 10, Grew: func(n int64) { told += n }})
	for n := range 300 {
		b, err := s.Put(pack.Record{Key: key(n), Value: value(n)})
		must(t, err)
		told += b
	}
	must(t, s.Count(t.Context().Done()))
	wantBytes(t, s, dir, told)
	_, live, _ := s.Bytes()
	records, bytes, err := s.Evict(t.Context().Done(), time.Now().Add(time.Hour), live/2, nil)
	if err != nil || bytes < live/2 || bytes > live/2+2000 || records < 100 || records > 200 {
		t.Errorf("evicted %d records of %d bytes, %v", records, bytes, err)
	}
	freed, moved, err := s.Clean(t.Context().Done(), 1<<40, 0.99, time.Time{})
	if err != nil || freed < live/3 || moved == 0 || moved > live-bytes {
		t.Errorf("freed %d, moved %d, %v", freed, moved, err)
	}
	wantBytes(t, s, dir, told)
	if _, now, _ := s.Bytes(); now != live-bytes {
		t.Errorf("%d bytes live, want %d", now, live-bytes)
	}
	left := 0
	for n := range 300 {
		if ok, err := s.Find(t.Context(), key(n)); err != nil {
			t.Error(err)
		} else if ok {
			left++
			wantValue(t, s, key(n), value(n))
		}
	}
	if left != 300-records {
		t.Errorf("%d records left of 300, and %d were evicted", left, records)
	}
}

func wantBytes(t *testing.T, s *pack.Store, dir string, told int64) {
	t.Helper()
	var onDisk int64
	must(t, filepath.WalkDir(dir, func(_ string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() == "secret" {
			return err
		}
		info, err := e.Info()
		onDisk += info.Size()
		return err
	}))
	if segs, _, index := s.Bytes(); segs+index != onDisk || told != onDisk {
		t.Errorf("%d bytes of segments and %d of the index, told of %d; the files have %d", segs, index, told, onDisk)
	}
}

// TestStore_Evict_oldest: what was used after the cutoff stays.
func TestStore_Evict_oldest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, pack.Options{TouchEvery: time.Minute})
		put(t, s, upTo(10)...)
		time.Sleep(time.Hour)
		put(t, s, 10)
		wantValue(t, s, key(3), value(3))
		if ok, err := s.Find(t.Context(), key(4)); !ok || err != nil {
			t.Error(ok, err)
		}
		put(t, s, 5) // again
		ages := map[time.Duration]int{}
		must(t, s.Survey(t.Context().Done(), func(use time.Time, _ int64) { ages[time.Since(use)+time.Second]++ }))
		if diff := cmp.Diff(map[time.Duration]int{0: 4, time.Hour: 7}, ages); diff != "" {
			t.Errorf("survey: -want +got:\n%s", diff)
		}
		if n, _, err := s.Evict(t.Context().Done(), time.Now(), 1<<40, nil); n != 7 || err != nil {
			t.Errorf("%d evicted, %v; want 7", n, err)
		}
		for n := range 11 {
			if n == 3 || n == 4 || n == 5 || n == 10 {
				wantValue(t, s, key(n), value(n))
			} else {
				wantGone(t, s, key(n))
			}
		}
	})
}

func TestStore_manySegments(t *testing.T) {
	s := open(t, pack.Options{SegmentBytes: 128})
	all := upTo(pack.MaxOpen + 100)
	put(t, s, all...)
	for _, n := range all {
		wantValue(t, s, key(n), value(n))
	}
	if s.Segments() < pack.MaxOpen || s.Open() > pack.MaxOpen+1 {
		t.Errorf("%d of %d segments are open", s.Open(), s.Segments())
	}
}

func TestStore_growsItsIndex(t *testing.T) {
	dir := t.TempDir()
	s := open(t, pack.Options{Dir: dir})
	const all = 100_000
	var rs []pack.Record
	for n := range all {
		rs = append(rs, pack.Record{Key: key(n), Value: key(n)})
	}
	_, err := s.Put(rs...)
	must(t, err)
	must(t, s.Close())
	s = open(t, pack.Options{Dir: dir})
	for n := range all {
		ok, err := s.Find(t.Context(), key(n))
		absent, err2 := s.Find(t.Context(), key(all+n))
		if !ok || absent || errors.Join(err, err2) != nil {
			t.Fatalf("record %d: %v, and one that is not there: %v; %v, %v", n, ok, absent, err, err2)
		}
	}
	if _, _, index := s.Bytes(); index > all*60 {
		t.Errorf("the index takes %d bytes a record", index/all)
	}
}

func TestStore_Put_refuses(t *testing.T) {
	s := open(t, pack.Options{})
	for name, r := range map[string]pack.Record{
		"no_key":      {Value: value(1)},
		"long_key":    {Key: make([]byte, pack.MaxKeyBytes+1)},
		"large_value": {Key: key(1), Value: make([]byte, pack.MaxRecordBytes)},
	} {
		if _, err := s.Put(r); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	largest := bytes.Repeat([]byte("x"), pack.MaxRecordBytes-100)
	_, err := s.Put(pack.Record{Key: key(2), Value: largest}, pack.Record{Key: key(3)})
	must(t, err)
	wantValue(t, s, key(2), largest)
	wantValue(t, s, key(3), nil)
}

func TestStore_afterClose(t *testing.T) {
	s := open(t, pack.Options{})
	put(t, s, 1)
	must(t, errors.Join(s.Close(), s.Close()))
	_, putErr := s.Put(pack.Record{Key: key(2)})
	_, findErr := s.Find(t.Context(), key(1))
	_, getErr := s.Get(t.Context(), key(1))
	for name, err := range map[string]error{"put": putErr, "find": findErr, "get": getErr} {
		if !errors.Is(err, blob.ErrUnavailable) {
			t.Errorf("%s: %v, want ErrUnavailable", name, err)
		}
	}
}

// TestStore_Clean_syncs: what was moved is durable before the segment that it
// was moved from goes, and where it can't be made so, nothing goes.
func TestStore_Clean_syncs(t *testing.T) {
	o := pack.Options{Dir: t.TempDir(), SegmentBytes: 4 << 10}
	s := open(t, o)
	put(t, s, upTo(100)...)
	_, _, err := s.Evict(t.Context().Done(), time.Now().Add(time.Hour), 8_000, nil)
	must(t, err)
	before, failed := len(segmentFiles(t, o.Dir)), errors.New("sync failed")
	s.SetSync(func(int) error { return failed })
	if freed, _, err := s.Clean(t.Context().Done(), 1<<20, 0.9, time.Time{}); freed > 0 || !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("freed %d, %v; want nothing, and ErrUnavailable", freed, err)
	}
	if now := len(segmentFiles(t, o.Dir)); now < before {
		t.Errorf("%d segments of %d are left", now, before)
	}
	synced := 0
	s.SetSync(func(int) error { synced++; return nil })
	freed, _, err := s.Clean(t.Context().Done(), 1<<20, 0.9, time.Time{})
	must(t, err)
	if synced == 0 || freed == 0 {
		t.Errorf("%d syncs, %d bytes freed", synced, freed)
	}
}
