package blobtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// releasedDir is where a package has the entries that it wrote in each release.
const releasedDir = "testdata/releases"

// A releasedEntry is an entry as it was recorded.
type releasedEntry struct {
	Instance, Action string
	Value            []byte
}

// A RecordedStore is one whose entries can be recorded.
type RecordedStore interface {
	blob.Entries
	blob.EntryLister
}

// RecordEntries keeps all entries of a store as those that a package wrote in a
// release. What a release wrote does not change: one that is recorded is not
// recorded again.
func RecordEntries(t *testing.T, s RecordedStore, release string) {
	t.Helper()
	path := filepath.Join(releasedDir, release+".json")
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("%s was recorded: record the next release: %v", release, err)
	}
	var all []releasedEntry
	for info, err := range s.EntryInfos(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		value, err := s.Entry(t.Context(), info.Key)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, releasedEntry{info.Key.Instance, info.Key.Action.String(), value})
	}
	slices.SortFunc(all, func(a, b releasedEntry) int { return strings.Compare(a.Instance+a.Action, b.Instance+b.Action) })
	text, err := json.MarshalIndent(all, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(releasedDir, 0o755), os.WriteFile(path, append(text, '\n'), 0o644)); err != nil { //nolint:gosec // part of the source
		t.Fatal(err)
	}
}

// EachRelease runs a test for each release that is recorded, of which there must be
// one; restore puts its entries into a store.
func EachRelease(t *testing.T, test func(t *testing.T, restore func(blob.Entries))) {
	t.Helper()
	paths, err := filepath.Glob(releasedDir + "/*.json")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no release is recorded: %v", err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".json"), func(t *testing.T) {
			test(t, func(s blob.Entries) {
				if err := restoreEntries(t, s, path); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

func restoreEntries(t *testing.T, s blob.Entries, path string) error {
	t.Helper()
	var all []releasedEntry
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &all)
	}
	if err == nil && len(all) == 0 {
		err = fmt.Errorf("%s has no entries", path)
	}
	for _, e := range all {
		d, parseErr := digest.Parse(e.Action)
		err = errors.Join(err, parseErr)
		if err == nil {
			err = s.PutEntry(t.Context(), blob.EntryKey{Instance: e.Instance, Action: d}, e.Value)
		}
	}
	return err
}
