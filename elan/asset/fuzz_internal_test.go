package asset

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
)

// FuzzParseTree: what git lists is read or refused.
func FuzzParseTree(f *testing.F) {
	const id = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
	f.Add("100644 blob " + id + "\ta\tb\x00120000 blob " + id + "\tl\n\x00")
	f.Add("100644 blob " + id + "\ta")
	f.Add("\x00")
	f.Add(strings.Repeat("a", maxPathBytes+2000))
	f.Fuzz(func(t *testing.T, text string) {
		entries, err := parseTree(strings.NewReader(text))
		if err == nil && len(entries) != strings.Count(text, "\x00") {
			t.Errorf("%d entries of %q", len(entries), text)
		}
		for _, e := range entries {
			if e.mode == "" || e.id == "" || strings.ContainsRune(e.path, 0) {
				t.Errorf("entry %+v", e)
			}
		}
	})
}

// FuzzCatAll: files come as long as git says that they are, or it is an error.
func FuzzCatAll(f *testing.F) {
	f.Add("id blob 3\nabc\n", "id")
	f.Add("id blob -1\n", "id")
	f.Add("id missing\n", "id")
	f.Add("id blob 9999999999999\nabc", "id")
	f.Fuzz(func(t *testing.T, text, id string) {
		read := 0
		err := catAll(bufio.NewReader(strings.NewReader(text)), []string{id}, func(_ string, size int64, body io.Reader) error {
			n, err := io.Copy(io.Discard, body)
			read++
			if n > size {
				t.Errorf("%d bytes of a file of %d", n, size)
			}
			return err
		})
		if err == nil && read != 1 {
			t.Errorf("%d files were read without an error", read)
		}
	})
}

// FuzzAnswers: what a server says in headers and URLs is taken with care.
func FuzzAnswers(f *testing.F) {
	f.Add("120", "https://user:secret@example.com/path?token=x", "text/html; charset=utf-8")
	f.Add("-1", "data:text/plain,x", "a/b; q")
	f.Add("99999999999999999999", "%zz", "")
	f.Fuzz(func(t *testing.T, after, uri, contentType string) {
		if d := retryAfter(after); d < 0 || d > 2*365*24*time.Hour {
			t.Errorf("%q is %v", after, d)
		}
		if o := origin(uri); len(o) > 260*4 || strings.Contains(uri, "secret") && strings.Contains(o, ":secret@") {
			t.Errorf("%q is told of as %q", uri, o)
		}
		_ = checkType(contentType, &want{resourceType: "text/html; charset=x"})
	})
}

// entries are all the same.
type sameEntry []byte

func (e sameEntry) Entry(context.Context, blob.EntryKey) ([]byte, error)  { return bytes.Clone(e), nil }
func (e sameEntry) PutEntry(context.Context, blob.EntryKey, []byte) error { return nil }
func (e sameEntry) DeleteEntry(context.Context, blob.EntryKey) error      { return nil }

// FuzzRecall: what is remembered of an asset is read, or as if it were not there.
func FuzzRecall(f *testing.F) {
	f.Add([]byte(entryMagic + `{"asked":"2026-01-02T03:04:05Z","qualifiers":[{"Name":"n","Value":"v"}],"blobs":["x"]}`))
	f.Add([]byte(entryMagic + `{"blobs":7}`))
	f.Add([]byte(entryMagic))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, value []byte) {
		s := &Service{o: Options{Entries: sameEntry(value)}}
		if e, err := s.recall(t.Context(), blob.EntryKey{}); err != nil && !errors.Is(err, blob.ErrNotFound) || (e == nil) == (err == nil) {
			t.Errorf("entry %v, %v", e, err)
		}
	})
}
