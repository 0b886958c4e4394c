package blobtest

import (
	"context"
	"fmt"
	"io"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Op is a call to a store that can be made to fail.
type Op string

// The calls. Read, Write, Commit and Close are those of what Open and Create return.
const (
	OpFind        Op = "find" // once for each digest
	OpOpen        Op = "open"
	OpRead        Op = "read"
	OpCreate      Op = "create"
	OpWrite       Op = "write"
	OpCommit      Op = "commit"
	OpEntry       Op = "entry"
	OpPutEntry    Op = "put entry"
	OpDeleteEntry Op = "delete entry"
)

// Fault decides about one call: what it returns, unless it is nil, is the
// call's error, and the store is not asked. It may block, to hold a call up.
// It is called by many goroutines at once.
type Fault func(op Op, d digest.Digest) error

// Faulty is a Store that fails on demand. It hides all other abilities of the
// store that it wraps.
type Faulty struct {
	blob.Store
	Fault Fault // not nil
}

// FaultyEntries is Faulty for Entries.
type FaultyEntries struct {
	blob.Entries
	Fault Fault // not nil
}

var (
	_ blob.Store   = Faulty{}
	_ blob.Entries = FaultyEntries{}
)

// Unwrap returns the store inside.
func (f Faulty) Unwrap() blob.Store { return f.Store }

// FindMissing implements blob.Finder.
func (f Faulty) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	for _, d := range ds {
		if err := f.Fault(OpFind, d); err != nil {
			return nil, fmt.Errorf("find blob %s: %w", d, err)
		}
	}
	return f.Store.FindMissing(ctx, ds)
}

// Open implements blob.Opener.
func (f Faulty) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if err := f.Fault(OpOpen, d); err != nil {
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	r, err := f.Store.Open(ctx, d, offset)
	if err != nil {
		return nil, err
	}
	return faultyReader{ReadCloser: r, d: d, fault: f.Fault}, nil
}

type faultyReader struct {
	io.ReadCloser
	d     digest.Digest
	fault Fault
}

func (r faultyReader) Read(p []byte) (int, error) {
	if err := r.fault(OpRead, r.d); err != nil {
		return 0, err
	}
	return r.ReadCloser.Read(p)
}

// Create implements blob.Creator.
func (f Faulty) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	if err := f.Fault(OpCreate, d); err != nil {
		return nil, fmt.Errorf("create blob %s: %w", d, err)
	}
	w, err := f.Store.Create(ctx, d)
	if err != nil {
		return nil, err
	}
	return faultyWriter{Writer: w, d: d, fault: f.Fault}, nil
}

type faultyWriter struct {
	blob.Writer
	d     digest.Digest
	fault Fault
}

func (w faultyWriter) Write(p []byte) (int, error) {
	if err := w.fault(OpWrite, w.d); err != nil {
		return 0, err
	}
	return w.Writer.Write(p)
}

func (w faultyWriter) Commit() error {
	if err := w.fault(OpCommit, w.d); err != nil {
		return err
	}
	return w.Writer.Commit()
}

// Entry implements blob.Entries.
func (f FaultyEntries) Entry(ctx context.Context, k blob.EntryKey) ([]byte, error) {
	if err := f.Fault(OpEntry, k.Action); err != nil {
		return nil, fmt.Errorf("entry %s: %w", k.Action, err)
	}
	return f.Entries.Entry(ctx, k)
}

// PutEntry implements blob.Entries.
func (f FaultyEntries) PutEntry(ctx context.Context, k blob.EntryKey, value []byte) error {
	if err := f.Fault(OpPutEntry, k.Action); err != nil {
		return fmt.Errorf("put entry %s: %w", k.Action, err)
	}
	return f.Entries.PutEntry(ctx, k, value)
}

// DeleteEntry implements blob.Entries.
func (f FaultyEntries) DeleteEntry(ctx context.Context, k blob.EntryKey) error {
	if err := f.Fault(OpDeleteEntry, k.Action); err != nil {
		return fmt.Errorf("delete entry %s: %w", k.Action, err)
	}
	return f.Entries.DeleteEntry(ctx, k)
}
