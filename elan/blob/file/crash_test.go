package file_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

// TestStore_crashOfTheMachine: after the power went, blobs that were durable are
// served, those that are half there are not, and none is before it was verified.
func TestStore_crashOfTheMachine(t *testing.T) {
	for _, damage := range []struct {
		name string
		do   func(path string) error
	}{
		{"shorter", func(p string) error { return os.Truncate(p, 100) }},
		{"empty", func(p string) error { return os.Truncate(p, 0) }},
		{"zeros", func(p string) error {
			return errors.Join(os.Chmod(p, 0o644), os.WriteFile(p, make([]byte, block), 0), os.Chmod(p, 0o444),
				os.Chtimes(p, time.Now(), time.Unix(946684800, 0)))
		}},
	} {
		t.Run(damage.name, func(t *testing.T) {
			dir := t.TempDir()
			o := file.Options{Dir: dir}
			o.SetBootID("first")
			s := open(t, o)
			bad, bad2, good := mustPut(t, s, 1), mustPut(t, s, 2), mustPut(t, s, 3)
			k := blob.EntryKey{Action: good}
			must(t, s.PutEntry(t.Context(), k, []byte("whole")))
			torn := blob.EntryKey{Action: bad}
			must(t, s.PutEntry(t.Context(), torn, []byte("torn by the crash")))
			must(t, s.Crash())
			must(t, damage.do(blobFile(s, bad)))
			must(t, damage.do(blobFile(s, bad2)))
			must(t, filepath.WalkDir(filepath.Join(dir, "ac"), func(p string, e os.DirEntry, err error) error {
				if err == nil && strings.HasPrefix(e.Name(), bad.Hash()) {
					return os.WriteFile(p, make([]byte, 30), 0o600)
				}
				return err
			}))

			o.SetBootID("second")
			s = open(t, o)
			wantGone(t, s, bad) // perhaps before the sweep comes to it, perhaps after
			wantRight(t, s, good)
			waitRecovered(t, s)
			wantGone(t, s, bad)
			wantGone(t, s, bad2)
			wantRight(t, s, good)
			if _, err := s.Entry(t.Context(), torn); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("torn entry: %v, want ErrNotFound", err)
			}
			if v, err := s.Entry(t.Context(), k); err != nil || string(v) != "whole" {
				t.Errorf("entry: %q, %v", v, err)
			}
			if got, want := mustPut(t, s, 1), bad; got != want {
				t.Fatal("not the same blob")
			}
			wantRight(t, s, bad)
			if left, err := filepath.Glob(dir + "/old-*"); err != nil || len(left) > 0 {
				t.Errorf("left after recovery: %v, %v", left, err)
			}
		})
	}
}

// waitRecovered waits until the sweep is over.
func waitRecovered(t *testing.T, s *file.Store) {
	t.Helper()
	<-s.Counted()
	if s.Recovering() {
		t.Error("the recovery did not end")
	}
}

// TestStore_crashAgain: a crash during recovery loses nothing.
func TestStore_crashAgain(t *testing.T) {
	dir := t.TempDir()
	o := file.Options{Dir: dir}
	var ds []digest.Digest
	for boot := range 4 {
		o.SetBootID(fmt.Sprint("boot ", boot))
		s := open(t, o)
		if boot == 3 {
			waitRecovered(t, s)
		}
		for _, d := range ds {
			wantRight(t, s, d)
		}
		ds = append(ds, mustPut(t, s, boot))
		if boot == 3 {
			must(t, s.Close())
		} else {
			must(t, s.Crash()) // at once: perhaps in the middle of the sweep
		}
	}
	o.SetBootID("after a clean shutdown")
	s := open(t, o)
	if s.Recovering() {
		t.Error("a store that was closed needs recovery")
	}
	for _, d := range ds {
		wantRight(t, s, d)
	}
}

func TestStore_sameBootNeedsNoRecovery(t *testing.T) {
	dir := t.TempDir()
	s := open(t, file.Options{Dir: dir})
	d := mustPut(t, s, 1)
	must(t, s.Crash())
	s = open(t, file.Options{Dir: dir})
	if s.Recovering() {
		t.Error("a killed process must not make the next one verify everything")
	}
	wantRight(t, s, d)
}
