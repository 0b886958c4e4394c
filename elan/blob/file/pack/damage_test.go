package pack_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file/pack"
)

// overwrite writes p at off into the file at path.
func overwrite(t testing.TB, path string, p []byte, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(p, off)
	must(t, errors.Join(err, f.Close()))
}

// find returns where p stands in the segments of dir.
func find(t testing.TB, dir string, p []byte) (path string, off int64) {
	t.Helper()
	for _, path := range segmentFiles(t, dir) {
		data, err := os.ReadFile(path)
		must(t, err)
		if i := bytes.Index(data, p); i >= 0 {
			return path, int64(i)
		}
	}
	t.Fatalf("%.40q is nowhere", p)
	return "", 0
}

// TestStore_damagedRecord: whatever part of a record is damaged, it is missing
// from then on, those around it are not, and it can be put again.
func TestStore_damagedRecord(t *testing.T) {
	for _, c := range []struct {
		name string
		at   int64 // from the key on
	}{{"magic", -24}, {"checksum", -20}, {"time", -16}, {"value_length", -8}, {"key_length", -4}, {"flags", -2}, {"key", 4}, {"value", 20}} {
		for _, how := range []string{"get", "verify", "clean", "power_loss"} {
			t.Run(c.name+"/"+how, func(t *testing.T) {
				var damaged [][]byte
				o := pack.Options{Dir: t.TempDir(), SegmentBytes: 4 << 10, Damaged: func(raw []byte) { damaged = append(damaged, raw) }}
				s := open(t, o)
				put(t, s, upTo(100)...)
				path, off := find(t, o.Dir, append(key(7), "value"...))
				data, err := os.ReadFile(path)
				must(t, err)
				overwrite(t, path, []byte{^data[off+c.at]}, off+c.at)
				switch how {
				case "verify":
					v, err := s.Verify(t.Context().Done(), noPace)
					if err != nil || v.Damaged != 1 || v.Records != 99 || len(damaged) != 1 {
						t.Errorf("verify: %+v, %v, told of %d", v, err, len(damaged))
					}
				case "clean":
					_, _, err := s.Clean(t.Context().Done(), 1<<40, 1, time.Time{})
					must(t, err)
				case "power_loss":
					must(t, s.Close())
					o.Untrusted = true
					s = open(t, o)
				}
				wantGone(t, s, key(7))
				if how == "get" && len(damaged) != 1 {
					t.Errorf("told of %d damaged records, want 1", len(damaged))
				}
				for n := range 100 {
					if n != 7 {
						wantValue(t, s, key(n), value(n))
					}
				}
				put(t, s, 7)
				wantValue(t, s, key(7), value(7))
			})
		}
	}
}

// TestStore_segmentGone: what stood in a segment that somebody removed or cut
// is missing, and what did not is there.
func TestStore_segmentGone(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"removed": os.Remove,
		"cut":     func(path string) error { return os.Truncate(path, 100) },
		"empty":   func(path string) error { return os.Truncate(path, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			o := pack.Options{Dir: t.TempDir(), SegmentBytes: 4 << 10}
			s := open(t, o)
			put(t, s, upTo(100)...)
			must(t, s.Close())
			must(t, damage(segmentFiles(t, o.Dir)[1]))
			s = open(t, o)
			there := 0
			for n := range 100 {
				v, err := s.Get(t.Context(), key(n))
				ok, err2 := s.Find(t.Context(), key(n))
				switch {
				case err == nil && bytes.Equal(v, value(n)) && ok:
					there++
				case !errors.Is(err, blob.ErrNotFound) || ok || err2 != nil:
					t.Fatalf("record %d: %.40q, %v; found %v, %v", n, v, err, ok, err2)
				}
			}
			if there < 80 || there > 99 {
				t.Errorf("%d of 100 are there", there)
			}
			put(t, s, upTo(100)...)
			for n := range 100 {
				wantValue(t, s, key(n), value(n))
			}
		})
	}
}

// TestStore_damagedIndex: an index that is not what it should be is made anew.
func TestStore_damagedIndex(t *testing.T) {
	for name, damage := range map[string]func(path string, data []byte) []byte{
		"cut":       func(_ string, data []byte) []byte { return data[:100] },
		"empty":     func(string, []byte) []byte { return nil },
		"longer":    func(_ string, data []byte) []byte { return append(data, make([]byte, 24)...) },
		"zeros":     func(_ string, data []byte) []byte { return make([]byte, len(data)) },
		"another's": func(_ string, data []byte) []byte { data[24]++; return data },
	} {
		t.Run(name, func(t *testing.T) {
			o := pack.Options{Dir: t.TempDir(), SegmentBytes: 64 << 10}
			s := open(t, o)
			put(t, s, upTo(1000)...)
			must(t, s.Close())
			files, err := filepath.Glob(o.Dir + "/index/*")
			must(t, err)
			data, err := os.ReadFile(files[5])
			must(t, err)
			must(t, os.WriteFile(files[5], damage(files[5], data), 0o600))
			s = open(t, o)
			for n := range 1000 {
				wantValue(t, s, key(n), value(n))
			}
			if _, err := os.Stat(o.Dir + "/index-old"); err == nil {
				t.Error("the damaged index was not removed")
			}
		})
	}
}

// TestStore_garbledSlots: no content of the slots makes a wrong value, hangs a
// search, or keeps a record from being put again.
func TestStore_garbledSlots(t *testing.T) {
	for seed := range uint64(8) {
		o := pack.Options{Dir: t.TempDir(), SegmentBytes: 64 << 10}
		s := open(t, o)
		put(t, s, upTo(300)...)
		must(t, s.Close())
		r := rand.New(rand.NewPCG(seed, 0))
		files, err := filepath.Glob(o.Dir + "/index/*")
		must(t, err)
		for _, f := range files {
			info, err := os.Stat(f)
			must(t, err)
			for range r.IntN(300) {
				// Half of them are random, half are those of other slots.
				word, at := r.Uint64(), 64+8*r.Int64N((info.Size()-64)/8)
				if r.IntN(2) == 0 {
					data, err := os.ReadFile(f)
					must(t, err)
					word = binary.NativeEndian.Uint64(data[64+8*r.Int64N((info.Size()-64)/8):])
				}
				overwrite(t, f, binary.NativeEndian.AppendUint64(nil, word), at)
			}
		}
		s = open(t, o)
		for n := range 300 {
			if v, err := s.Get(t.Context(), key(n)); err == nil && !bytes.Equal(v, value(n)) || err != nil && !errors.Is(err, blob.ErrNotFound) {
				t.Fatalf("record %d: %.40q, %v", n, v, err)
			}
			put(t, s, n)
			wantValue(t, s, key(n), value(n))
		}
		_, _, err = s.Evict(t.Context().Done(), time.Now().Add(time.Hour), 1<<20, nil)
		must(t, err)
		_, _, err = s.Clean(t.Context().Done(), 1<<20, 1, time.Time{})
		must(t, err)
	}
}

// TestStore_powerLoss: pages of the end that never reached the disk. What is
// whole is there, what is not is missing, and last uses hold as far as known.
func TestStore_powerLoss(t *testing.T) {
	for seed := range uint64(10) {
		o := pack.Options{Dir: t.TempDir(), SegmentBytes: 16 << 10}
		s := open(t, o)
		put(t, s, upTo(200)...)
		must(t, s.Close())
		r := rand.New(rand.NewPCG(seed, 1))
		lost := map[string]bool{}
		for _, path := range append(segmentFiles(t, o.Dir)[3:], indexFiles(t, o.Dir)[:20]...) {
			info, err := os.Stat(path)
			must(t, err)
			off := r.Int64N(info.Size()) &^ 511
			overwrite(t, path, make([]byte, min(512, info.Size()-off)), off)
			lost[path] = true
		}
		o.Untrusted = true
		s = open(t, o)
		there := 0
		for n := range 200 {
			v, err := s.Get(t.Context(), key(n))
			switch {
			case err == nil && bytes.Equal(v, value(n)):
				there++
			case !errors.Is(err, blob.ErrNotFound):
				t.Fatalf("record %d: %.40q, %v", n, v, err)
			}
		}
		if there < 150 {
			t.Errorf("only %d of 200 are there", there)
		}
	}
}

func indexFiles(t testing.TB, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(dir + "/index/*")
	must(t, err)
	return files
}

// TestStore_lastUseSurvivesPowerLoss: it does as far as the old index knows it.
func TestStore_lastUseSurvivesPowerLoss(t *testing.T) {
	o := pack.Options{Dir: t.TempDir()}
	s := open(t, o)
	put(t, s, upTo(100)...)
	must(t, s.Close())
	for _, f := range indexFiles(t, o.Dir) {
		data, err := os.ReadFile(f)
		must(t, err)
		for at := 64; at < len(data); at += 24 {
			if binary.NativeEndian.Uint64(data[at+16:]) > 1 {
				word := binary.NativeEndian.Uint64(data[at+8:])&^0xffffffff | 1_000_000
				binary.NativeEndian.PutUint64(data[at+8:], word)
			}
		}
		must(t, os.WriteFile(f, data, 0o600))
	}
	must(t, os.Remove(indexFiles(t, o.Dir)[0]))
	o.Untrusted = true
	s = open(t, o)
	must(t, s.Count(t.Context().Done()))
	old, now := 0, 0
	must(t, s.Survey(t.Context().Done(), func(use time.Time, _ int64) {
		switch {
		case use.Unix() == 1_000_001:
			old++
		case time.Since(use) < time.Hour:
			now++
		}
	}))
	if old+now != 100 || old < 80 || now == 0 {
		t.Errorf("%d with the use that the index had, %d with that of the start", old, now)
	}
}

// TestStore_rebuildInterrupted: a start that makes the index anew, and dies,
// is followed by one that does it again.
func TestStore_rebuildInterrupted(t *testing.T) {
	o := pack.Options{Dir: t.TempDir(), SegmentBytes: 4 << 10}
	s := open(t, o)
	put(t, s, upTo(200)...)
	must(t, s.Close())
	untrusted := o
	untrusted.Untrusted = true
	for range 5 {
		s = open(t, untrusted)
		must(t, s.Close()) // at once: in the midst of it, most likely
	}
	s = open(t, o)
	for n := range 200 {
		wantValue(t, s, key(n), value(n))
	}
}

func TestNew_refuses(t *testing.T) {
	noSecret, cutSecret := t.TempDir(), t.TempDir()
	for _, dir := range []string{noSecret, cutSecret} {
		s := open(t, pack.Options{Dir: dir})
		put(t, s, 1)
		must(t, s.Close())
	}
	must(t, os.Remove(noSecret+"/secret"))
	must(t, os.Truncate(cutSecret+"/secret", 3))
	for name, c := range map[string]struct {
		o    pack.Options
		want string
	}{
		"no_directory":     {pack.Options{}, "no directory"},
		"small_segments":   {pack.Options{Dir: t.TempDir(), SegmentBytes: 1}, "segments of 1"},
		"large_segments":   {pack.Options{Dir: t.TempDir(), SegmentBytes: pack.MaxSegmentBytes + 1}, "at most"},
		"negative_touch":   {pack.Options{Dir: t.TempDir(), TouchEvery: -1}, "touching"},
		"without_secret":   {pack.Options{Dir: noSecret}, "secret is missing"},
		"truncated_secret": {pack.Options{Dir: cutSecret}, "has 3 bytes"},
	} {
		if s, err := pack.New(c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v; want an error that has %q", name, s, err, c.want)
		}
	}
}

// FuzzSegment: a segment may have any bytes. What is found in it is what was
// put, even where the bytes of a value look like a record.
func FuzzSegment(f *testing.F) {
	s := open(f, pack.Options{})
	rec := s.AppendRecord(nil, pack.Record{Key: key(1), Value: value(1)})
	f.Add([]byte{}, 0)
	f.Add(rec, 8)
	f.Add(append(rec[:len(rec)-8:len(rec)-8], rec...), 1)
	f.Fuzz(func(t *testing.T, data []byte, at int) {
		// The secret keeps foreign bytes from being records.
		if got := s.ScanBytes(data); len(got) > 0 && !bytes.Contains(data, rec[:24]) {
			t.Errorf("found %q", got)
		}
		at = max(0, min(at, len(data))) &^ 7
		mixed := append(bytes.Clone(data[:at]), rec...)
		mixed = append(mixed, data[at:]...)
		found := false
		for _, v := range s.ScanBytes(mixed) {
			found = found || bytes.Equal(v, value(1))
		}
		if !found {
			t.Error("a whole record was not found among others")
		}
	})
}

// FuzzIndex: a file of the index may have any bytes. No value comes out wrong,
// and what was put is there afterwards.
func FuzzIndex(f *testing.F) {
	o := pack.Options{Dir: f.TempDir(), SegmentBytes: 16 << 10}
	s := open(f, o)
	put(f, s, upTo(100)...)
	must(f, s.Close())
	file := indexFiles(f, o.Dir)[0]
	whole, err := os.ReadFile(file)
	must(f, err)
	f.Add([]byte{}, 0, false)
	f.Add(make([]byte, 5000), 0, false)
	f.Add([]byte("garbage"), 24, true)
	f.Add(bytes.Repeat([]byte{0xff}, 4000), 64, true)
	f.Fuzz(func(t *testing.T, data []byte, at int, over bool) {
		if over { // over what is right
			right := bytes.Clone(whole)
			copy(right[max(0, min(at, len(right))):], data)
			data = right
		}
		must(t, os.WriteFile(file, data, 0o600))
		s := open(t, o)
		for n := range 100 {
			if v, err := s.Get(t.Context(), key(n)); err == nil && !bytes.Equal(v, value(n)) || err != nil && !errors.Is(err, blob.ErrNotFound) {
				t.Fatalf("record %d: %.40q, %v", n, v, err)
			}
			put(t, s, n)
			wantValue(t, s, key(n), value(n))
		}
		must(t, s.Close())
	})
}

// FuzzSecret: the file that tells our records from foreign bytes may have any bytes.
// A value is found by the right ones alone, and never a wrong one.
func FuzzSecret(f *testing.F) {
	o := pack.Options{Dir: f.TempDir(), SegmentBytes: 16 << 10}
	s := open(f, o)
	put(f, s, 1)
	must(f, s.Close())
	path := o.Dir + "/secret"
	right, err := os.ReadFile(path)
	must(f, err)
	f.Add(right)
	f.Add(right[:3])
	f.Add(bytes.Repeat([]byte{0}, len(right)))
	f.Fuzz(func(t *testing.T, data []byte) {
		must(t, os.WriteFile(path, data, 0o600))
		defer func() { must(t, os.WriteFile(path, right, 0o600)) }()
		s, err := pack.New(o)
		if err != nil {
			if len(data) == len(right) {
				t.Errorf("%x: %v", data, err)
			}
			return
		}
		if v, err := s.Get(t.Context(), key(1)); err == nil && !bytes.Equal(v, value(1)) || bytes.Equal(data, right) && err != nil {
			t.Errorf("%x: the record is %.40q, %v", data, v, err)
		}
		must(t, s.Close())
	})
}
