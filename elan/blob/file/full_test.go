package file_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
)

// TestStore_full: a full store says so, not too often, and for a while.
func TestStore_full(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer // written under the handler's lock, read when all is quiet
		reg := prometheus.NewRegistry()
		s := openQuiet(t, file.Options{
			MaxBytes: 20 * block, MinLifetime: time.Hour, Registerer: reg,
			Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn})),
		})
		for i := range 20 {
			mustPut(t, s, i)
		}
		if err := s.Full(); err != nil {
			t.Errorf("full though nothing was refused: %v", err)
		}
		for i := range 90 { // for one and a half minutes
			if _, err := put(t, s, 100+i); !errors.Is(err, blob.ErrFull) {
				t.Fatalf("put: %v, want ErrFull", err)
			}
			time.Sleep(time.Second)
		}
		if err := s.Full(); !errors.Is(err, blob.ErrFull) {
			t.Errorf("full: %v, want ErrFull", err)
		}
		synctest.Wait()
		if n := bytes.Count(log.Bytes(), []byte("refuses writes")); n != 2 {
			t.Errorf("the log says %d times that the store is full, want 2:\n%s", n, &log)
		}
		if n := metric(t, reg, "refused_total"); n != 90 {
			t.Errorf("%v writes refused, want 90", n)
		}
		time.Sleep(blob.FullFor)
		if err := s.Full(); err != nil {
			t.Errorf("full, long after: %v", err)
		}
	})
}

// TestStore_ageOfTheEvicted: the metrics tell for how long what goes had not
// been used, and never more than is sure.
func TestStore_ageOfTheEvicted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		s := openQuiet(t, file.Options{MaxBytes: 40 * block, MinLifetime: 4 * time.Hour, Registerer: reg})
		for i := range 40 {
			mustPut(t, s, i)
		}
		for _, name := range []string{"youngest_evicted_age_seconds", "eviction_age_seconds"} {
			if got := metric(t, reg, name); !math.IsInf(got, 1) {
				t.Errorf("%s is %v before anything was evicted", name, got)
			}
		}
		begun := time.Now()
		time.Sleep(10 * time.Hour)
		mustPut(t, s, 100)
		// The recorded use may be an hour older than the true one.
		most := time.Since(begun) - time.Hour
		for _, name := range []string{"youngest_evicted_age_seconds", "eviction_age_seconds"} {
			got := metric(t, reg, name)
			if got > most.Seconds()+1 || got < metric(t, reg, "min_lifetime_seconds") {
				t.Errorf("%s is %v, want between %v and %v", name, got, (4 * time.Hour).Seconds(), most.Seconds())
			}
		}
	})
}

// TestStore_opensOnFullDisk: a store that can't be opened, or closed, without room
// could never make any.
func TestStore_opensOnFullDisk(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=16m"); err != nil {
		t.Skipf("can't mount a small disk: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(disk, unix.MNT_DETACH)) })
	o := packing(file.Options{Dir: filepath.Join(disk, "store"), MinFreeBytes: 1 << 20})
	s := open(t, o)
	d := mustPut(t, s, 1)
	other, err := os.Create(filepath.Join(disk, "of_somebody_else"))
	must(t, err)
	for err == nil {
		_, err = other.Write(make([]byte, block))
	}
	must(t, other.Close())
	must(t, s.Close())
	for _, clean := range []bool{true, false} {
		if cp, err := os.ReadFile(filepath.Join(disk, "store", "checkpoint")); err != nil || !strings.Contains(string(cp), fmt.Sprintf(`"clean":%v`, clean)) {
			t.Errorf("the checkpoint says %q, error %v; want clean to be %v", cp, err, clean)
		}
		if clean {
			s = open(t, o)
		}
	}
	wantRight(t, s, d)
	if _, err := put(t, s, 2); !errors.Is(err, blob.ErrFull) {
		t.Errorf("put: %v, want ErrFull", err)
	}
	must(t, s.Close())
	must(t, os.Remove(other.Name()))
	s = open(t, o)
	wantRight(t, s, d)
	mustPut(t, s, 3)
}

// TestStore_freeAfterRestart: what the packs have is not taken off the free space
// again, which would refuse writes, and evict, on a disk that has room.
func TestStore_freeAfterRestart(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=16m"); err != nil {
		t.Skipf("can't mount a small disk: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(disk, unix.MNT_DETACH)) })
	o := packing(file.Options{Dir: filepath.Join(disk, "store"), MinFreeBytes: 1 << 20})
	s := open(t, o)
	for i := range 1000 {
		mustPut(t, s, i)
	}
	must(t, s.Close())
	reg := prometheus.NewRegistry()
	o.Registerer = reg
	open(t, o)
	var st unix.Statfs_t
	must(t, unix.Statfs(disk, &st))
	if got, want := metric(t, reg, "free_bytes"), float64(st.Bavail)*float64(st.Bsize); math.Abs(got-want) > 16*block {
		t.Errorf("%.0f bytes are said to be free, and %.0f are", got, want)
	}
}
