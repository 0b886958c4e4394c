package main

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// FuzzDigests: of what comes by standard input the first word of each line is a
// digest, or it is refused.
func FuzzDigests(f *testing.F) {
	d := digest.Of(digest.SHA256, []byte("x")).String()
	f.Add(d + "\tfile\n\n " + d + "\r\n")
	f.Add("x\n")
	f.Add(strings.Repeat("a", maxLine))
	f.Fuzz(func(t *testing.T, text string) {
		got, err := (&digestArgs{Digests: []string{"-"}}).parse(strings.NewReader(text))
		if err != nil {
			return
		}
		want := 0
		for line := range strings.Lines(text) {
			if len(strings.Fields(line)) > 0 {
				want++
			}
		}
		if len(got) != want {
			t.Errorf("%d digests on %d lines", len(got), want)
		}
	})
}

// always are entries that are all the same.
type always []byte

func (a always) Entry(context.Context, blob.EntryKey) ([]byte, error)  { return bytes.Clone(a), nil }
func (a always) PutEntry(context.Context, blob.EntryKey, []byte) error { return nil }
func (a always) DeleteEntry(context.Context, blob.EntryKey) error      { return nil }

// FuzzEntryResults: an entry of a store is a result, or said to be none.
func FuzzEntryResults(f *testing.F) {
	f.Add([]byte{}, "")
	f.Add([]byte("\x20\x01"), "main")
	f.Add([]byte("\xff"), "failed")
	k := digest.Of(digest.SHA256, []byte("x"))
	f.Fuzz(func(t *testing.T, value []byte, instance string) {
		r, err := (entryResults{always(value)}).Get(t.Context(), blob.EntryKey{Instance: instance, Action: k})
		if err == nil && r == nil {
			t.Error("neither a result nor an error")
		}
	})
}
