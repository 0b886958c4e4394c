package file_test

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

// TestStore_entryOfBefore: an entry of the first format, without its instance's
// name, is served and listed.
func TestStore_entryOfBefore(t *testing.T) {
	dir := t.TempDir()
	s := open(t, file.Options{Dir: dir})
	k := blob.EntryKey{Action: digest.Of(digest.SHA256, []byte("action"))}
	value := []byte("a value of old")
	data := binary.BigEndian.AppendUint32([]byte("ME1\n"), crc32.Checksum(value, crc32.MakeTable(crc32.Castagnoli)))
	path := filepath.Join(dir, "ac", "sha256", k.Action.Hash()[:2], k.Action.Hash()+"-6")
	must(t, os.WriteFile(path, append(data, value...), 0o444))
	if got, err := s.Entry(t.Context(), k); err != nil || !bytes.Equal(got, value) {
		t.Errorf("entry %q, %v; want %q", got, err, value)
	}
	n := 0
	for info, err := range s.EntryInfos(t.Context()) {
		if n++; err != nil || info.Key != k || info.Bytes != int64(len(value)) {
			t.Errorf("listed %+v, %v; want %+v with %d bytes", info, err, k, len(value))
		}
	}
	if n != 1 {
		t.Errorf("%d entries listed, want 1", n)
	}
}

// TestStore_Blobs_tellsTheTruth: what is listed adds up to what is used, the
// twins of executables included, and listing is no use.
func TestStore_Blobs_tellsTheTruth(t *testing.T) {
	s := openQuiet(t, file.Options{})
	for i := range 10 {
		d := mustPut(t, s, i)
		if i%2 == 0 {
			must(t, s.Link(t.Context(), d, filepath.Join(t.TempDir(), "x"), blob.LinkExecutable))
		}
	}
	for range 2 {
		var sum int64
		for info, err := range s.Blobs(t.Context()) {
			must(t, err)
			sum += info.StoredBytes
		}
		if sum != s.Used() || sum != 15*block {
			t.Errorf("%d bytes listed, %d used; want %d", sum, s.Used(), 15*block)
		}
	}
}

// FuzzParseEntry: no bytes make it fail, and what it takes for whole is what was
// written.
func FuzzParseEntry(f *testing.F) {
	f.Add(file.FormatEntry("main", []byte("value")))
	f.Add(file.FormatEntry("", nil))
	f.Add([]byte("ME1\n\x00\x00\x00\x00"))
	f.Add([]byte("ME2\n\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"))
	f.Fuzz(func(t *testing.T, data []byte) {
		instance, value, ok := file.ParseEntry(data)
		if !ok || !bytes.HasPrefix(data, []byte("ME2\n")) {
			return
		}
		// A uvarint can be written in more than one way, only the shortest is ours.
		if again := file.FormatEntry(instance, value); len(again) == len(data) && !bytes.Equal(again, data) {
			t.Errorf("%q is read as %q and %q, which is written %q", data, instance, value, again)
		}
	})
}
