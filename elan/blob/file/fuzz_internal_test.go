package file

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// FuzzParseKey: a key of a pack is one that we write, or no key.
func FuzzParseKey(f *testing.F) {
	d := digest.Of(digest.SHA256, []byte("x"))
	space, err := digest.ParseSpace("0123456789abcdef0123456789abcdef")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(appendBlobKey(nil, d))
	f.Add(appendBlobKey(nil, d.In(space)))
	f.Add(appendEntryKey(nil, blob.EntryKey{Action: d}))
	f.Add(appendEntryKey(nil, blob.EntryKey{Action: d.In(space), Instance: "main"}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, key []byte) {
		d, entry, ok := parseKey(key)
		if !ok {
			return
		}
		made := appendBlobKey(nil, d)
		if entry {
			made = appendEntryKey(nil, blob.EntryKey{Action: d})
		}
		// The instance of an entry is no more than a hash in the key.
		if again, e, ok := parseKey(made); !ok || again != d || e != entry {
			t.Errorf("%x is %s, whose key is %x", key, d, made)
		}
	})
}

// FuzzParseBlobName: a file that is taken for a blob is named as one.
func FuzzParseBlobName(f *testing.F) {
	const hash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	f.Add(hash + "-0")
	f.Add(hash + "-12x")
	f.Add(hash + "-12-0123456789abcdef0123456789abcdef")
	f.Add(hash + "-")
	f.Fuzz(func(t *testing.T, name string) {
		d, mode, ok := parseBlobName(digest.SHA256, name)
		if !ok || d.Size() == 0 {
			return
		}
		s := &Store{casDir: "/cas"}
		if got := filepath.Base(s.blobPath(d, mode)); got != name {
			t.Errorf("%q is taken for %s, whose file is %q", name, d, got)
		}
	})
}

// FuzzSmallFiles: what the small files of a store hold is read, or as if they were
// not there; and no other version than ours is taken for it.
func FuzzSmallFiles(f *testing.F) {
	s := &Store{dir: f.TempDir(), log: slog.New(slog.DiscardHandler)}
	f.Add([]byte(version))
	f.Add([]byte(version1))
	f.Add([]byte("mettle file store 999\n"))
	f.Add([]byte(`{"boot_id":7}`))
	f.Add([]byte(`{"boot_id":"x","clean":true,"at":"2026-01-02T03:04:05Z"}`))
	f.Add([]byte("[]"))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, name := range []string{versionFile, checkpointFile, scrubFile} {
			if err := os.WriteFile(filepath.Join(s.dir, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		known := len(text) == 0 || string(text) == version || string(text) == version1
		if err := s.checkVersion(); len(text) > 0 && (err == nil) != known {
			t.Errorf("version %q: %v", text, err)
		}
		if cp := (&recovery{}).read(s); !json.Valid(text) && cp != (checkpoint{}) {
			t.Errorf("%q is read as %+v", text, cp)
		}
		if st := s.readScrubState(); !json.Valid(text) && st != (scrubState{}) {
			t.Errorf("%q is read as %+v", text, st)
		}
	})
}
