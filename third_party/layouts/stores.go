package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/sstable"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

// fileStore is elan/blob/file.
type fileStore struct{ s *file.Store }

func openFile(dir string, maxPacked int64) (layout, error) {
	s, err := file.New(file.Options{Dir: dir, MaxPackedBytes: maxPacked, MinFreeBytes: -1, ScrubBytesPerSecond: -1})
	if err != nil {
		return nil, err
	}
	return fileStore{s}, nil
}

func (f fileStore) put(ctx context.Context, d digest.Digest, data []byte) error {
	return blob.ReceiveBytes(ctx, f.s, d, data)
}

func (f fileStore) get(ctx context.Context, d digest.Digest, data []byte) error {
	return blob.ReadInto(ctx, f.s, d, data)
}

func (f fileStore) missing(ctx context.Context, ds []digest.Digest) (int, error) {
	missing, err := f.s.FindMissing(ctx, ds)
	return len(missing), err
}

func (f fileStore) close() error { return f.s.Close() }

// database keeps digests and blobs in one Pebble database. Like the file store
// it survives a kill, and syncs nothing. It records no last use, and so could not
// evict.
type database struct {
	db    *pebble.DB
	cache *pebble.Cache
}

func openPebble(dir string) (layout, error) {
	cache := pebble.NewCache(256 << 20)
	o := &pebble.Options{
		Cache:                       cache,
		Logger:                      errorsOnly{},
		MemTableSize:                64 << 20,
		MemTableStopWritesThreshold: 4,
		L0CompactionThreshold:       2,
		L0StopWritesThreshold:       1000,
		CompactionConcurrencyRange:  func() (int, int) { return 1, 2 },
	}
	for i := range o.Levels {
		o.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
		o.Levels[i].Compression = func() *sstable.CompressionProfile { return sstable.NoCompression } // blobs are compressed at rest elsewhere
	}
	db, err := pebble.Open(dir, o)
	if err != nil {
		return nil, err
	}
	return &database{db: db, cache: cache}, nil
}

// errorsOnly is Pebble's logger.
type errorsOnly struct{}

func (errorsOnly) Infof(string, ...any) {}

func (errorsOnly) Errorf(format string, args ...any) {
	slog.Error("pebble", "message", fmt.Sprintf(format, args...))
}

func (e errorsOnly) Fatalf(format string, args ...any) {
	e.Errorf(format, args...)
	os.Exit(1) //nolint:revive // Pebble asks that it does not return
}

func key(d digest.Digest) []byte {
	b := append(make([]byte, 0, 80), d.Hash()...)
	return strconv.AppendInt(append(b, '-'), d.Size(), 10)
}

func (p *database) put(_ context.Context, d digest.Digest, data []byte) error {
	if got := digest.Of(d.Function(), data); got != d {
		return blob.ErrCorrupt
	}
	return p.db.Set(key(d), data, pebble.NoSync)
}

func (p *database) get(_ context.Context, d digest.Digest, data []byte) error {
	value, done, err := p.db.Get(key(d))
	if err != nil {
		return err
	}
	if n := copy(data, value); n != len(data) {
		err = fmt.Errorf("a value of %d bytes", n)
	}
	return errors.Join(err, done.Close())
}

func (p *database) missing(_ context.Context, ds []digest.Digest) (n int, err error) {
	for _, d := range ds {
		_, done, err := p.db.Get(key(d))
		switch {
		case errors.Is(err, pebble.ErrNotFound):
			n++
		case err != nil:
			return 0, err
		default:
			if err := done.Close(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

func (p *database) close() error {
	err := errors.Join(p.db.Flush(), p.db.Close())
	p.cache.Unref()
	return err
}
