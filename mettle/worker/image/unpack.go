//go:build linux

package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// unpackOptions say where a layer goes and what it may have.
type unpackOptions struct {
	dir        string // empty
	white      whiteouts
	maxBytes   int64 // of the tar, and of all files together
	maxEntries int
	// reserve is asked before bytes are written, and remembers them.
	reserve func(n int64) error
}

// unpackBlob unpacks a layer as it comes, and returns the number of its entries.
// With an error, something may be in the directory; without, all was verified.
func unpackBlob(ctx context.Context, blob io.Reader, d descriptor, o unpackOptions) (entries int, err error) {
	// Packed, it may not be longer than the manifest says, nor unpacked than is
	// allowed: whatever a few bytes may claim to unpack to.
	packed := &meter{r: &cancelled{ctx, blob}, hash: sha256.New(), left: d.Size}
	if d.Size == 0 {
		packed.left = o.maxBytes // of a tarball, which does not say
	}
	entries, err = unpackVerified(packed, d, o)
	if bad, ok := errors.AsType[streamError](err); ok && !errors.Is(err, ErrUnusable) {
		if packed.err != nil && packed.left > 0 {
			return entries, unavailable(err)
		}
		// All of it came, and makes no sense.
		return entries, fmt.Errorf("%w: it is damaged: %w", ErrUnusable, bad.error)
	}
	return entries, err
}

// streamError is an error of reading a layer, in contrast to those of writing it.
type streamError struct{ error }

func (e streamError) Unwrap() error { return e.error }

func unpackVerified(packed *meter, d descriptor, o unpackOptions) (entries int, err error) {
	plain, closePlain, err := decompress(packed)
	if err != nil {
		return 0, streamError{err}
	}
	defer closePlain()
	unpacked := &meter{r: plain, hash: sha256.New(), left: o.maxBytes}
	if entries, err = unpack(unpacked, o); err != nil {
		return entries, err
	}
	for _, m := range []*meter{unpacked, packed} { // what is behind the last entry
		if _, err := io.Copy(io.Discard, m); err != nil {
			return entries, streamError{err}
		}
	}
	if !d.Saved {
		if err := packed.check(d.Blob.Hex); err != nil {
			return entries, err
		}
	}
	return entries, unpacked.check(d.DiffID.Hex)
}

// decompress finds out how the layer is compressed by its first bytes, whatever
// its manifest says.
func decompress(r io.Reader) (io.Reader, func(), error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		return z, func() {}, err
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return b, func() {}, nil
}

// cancelled ends with ctx.
type cancelled struct {
	ctx context.Context //nolint:containedctx // io.Reader has no place for it
	r   io.Reader
}

func (c *cancelled) Read(p []byte) (int, error) {
	if err := context.Cause(c.ctx); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// meter hashes what is read, and ends with an error when it is too much.
type meter struct {
	r    io.Reader
	hash hash.Hash
	left int64
	err  error // of r, but for its end
}

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	m.hash.Write(p[:n])
	if m.left -= int64(n); m.left < 0 {
		return 0, fmt.Errorf("%w: it is larger than it says, or than is allowed", ErrUnusable)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		m.err = err
	}
	return n, err
}

func (m *meter) check(want string) error {
	if got := hex.EncodeToString(m.hash.Sum(nil)); got != want {
		return fmt.Errorf("%w: it is damaged: its digest is sha256:%s, not sha256:%s", ErrUnusable, got, want)
	}
	return nil
}

// unpack unpacks a tar.
func unpack(r io.Reader, o unpackOptions) (entries int, err error) {
	root, err := unix.Open(o.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", o.dir, err)
	}
	u := &unpacker{o: o, root: root, parent: -1}
	defer u.close()
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return u.entries, u.finish()
		}
		if err != nil {
			return u.entries, streamError{err}
		}
		if err := u.add(h, tr); err != nil {
			return u.entries, fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
	}
}
