package asset

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/klauspost/compress/zstd"

	"github.com/mettle-build/mettle/elan/digest"
)

// maxWindow bounds what decompressing zstd takes: what its command uses up to -19.
const maxWindow = 8 << 20

// fetchArchive fetches an archive and unpacks it into the store. The archive
// itself is not kept.
func (s *Service) fetchArchive(ctx context.Context, w *want, src source) (fetched, error) {
	sp := s.newSpool(w.store)
	defer sp.Close() //nolint:errcheck // nothing of it is kept
	sum, err := s.http.fetch(ctx, w, src, sp)
	if err != nil {
		return fetched{}, err
	}
	u := s.newUploader(w.store, w.fn)
	b := &builder{}
	if err := unpack(ctx, io.NewSectionReader(sp.reader(), 0, sp.n), u, b); err != nil {
		return fetched{}, err
	}
	root, err := b.store(ctx, u, w.directory)
	return fetched{digest: root, sum: sum}, err
}

// unpack reads an archive, whose format its first bytes tell. What is wrong with
// it is a FetchError; files are bounded by u, paths checked by b.
func unpack(ctx context.Context, r *io.SectionReader, u *uploader, b *builder) error {
	head := make([]byte, 512)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("spool: %w", err)
	}
	head = head[:n]
	switch {
	case bytes.HasPrefix(head, []byte("PK\x03\x04")), bytes.HasPrefix(head, []byte("PK\x05\x06")):
		return unpackZip(ctx, r, u, b)
	case bytes.HasPrefix(head, []byte("\x1f\x8b")):
		z, err := gzip.NewReader(r)
		if err != nil {
			return malformed(err)
		}
		return unpackTar(ctx, z, u, b)
	case bytes.HasPrefix(head, []byte("BZh")):
		return unpackTar(ctx, bzip2.NewReader(r), u, b)
	case bytes.HasPrefix(head, []byte("\x28\xb5\x2f\xfd")):
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return malformed(err)
		}
		defer z.Close()
		return unpackTar(ctx, z, u, b)
	case len(head) == 512 && bytes.HasPrefix(head[257:], []byte("ustar")):
		return unpackTar(ctx, r, u, b)
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		return failed(Aborted, "it is compressed by xz, which is not unpacked here: want tar, plain or by gzip, bzip2 or zstd, or zip")
	}
	return failed(Aborted, "it is no archive that is known here: want tar, plain or by gzip, bzip2 or zstd, or zip")
}

func malformed(err error) error { return failed(Aborted, "the archive is malformed: %w", err) }

// reading passes through what r has, and marks r's errors as the archive's.
type reading struct {
	ctx context.Context //nolint:containedctx // a reader of one call
	r   io.Reader
}

// Read implements io.Reader.
func (x reading) Read(p []byte) (int, error) {
	if err := x.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := x.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = malformed(err)
	}
	return n, err
}

// limited fails when more comes out of a decompressor than all files may have,
// with some for headers: also what is passed over has to be decompressed.
type limited struct {
	r    io.Reader
	left int64
}

// Read implements io.Reader.
func (l *limited) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return 0, failed(TooLarge, "it has more bytes than are taken")
	}
	return n, err
}

func unpackTar(ctx context.Context, r io.Reader, u *uploader, b *builder) error {
	t := tar.NewReader(&limited{r: r, left: u.room + u.room/8 + 64<<20})
	for first := true; ; first = false {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := t.Next()
		switch f, ok := errors.AsType[*FetchError](err); {
		case errors.Is(err, io.EOF) && !first:
			return nil
		case errors.Is(err, io.EOF):
			return failed(Aborted, "the archive is empty")
		case ok:
			return f
		case err != nil:
			return malformed(err)
		}
		if err := unpackEntry(ctx, t, h, u, b); err != nil {
			return err
		}
	}
}

func unpackEntry(ctx context.Context, t *tar.Reader, h *tar.Header, u *uploader, b *builder) error {
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		if h.Size > u.room {
			return u.take(h.Size)
		}
		d, err := u.file(ctx, reading{ctx, t})
		if err != nil {
			return err
		}
		return b.file(h.Name, file{digest: d, executable: h.Mode&0o111 != 0})
	case tar.TypeDir:
		return b.directory(h.Name)
	case tar.TypeSymlink:
		return b.link(h.Name, h.Linkname)
	case tar.TypeLink:
		f, ok := b.find(h.Linkname)
		if !ok {
			return failed(Aborted, "%.200q is a link to %.200q, which is no file before it", h.Name, h.Linkname)
		}
		return b.file(h.Name, f)
	case tar.TypeXGlobalHeader:
		return nil
	}
	return failed(Aborted, "%.200q is neither a file nor a directory nor a symlink", h.Name)
}

func unpackZip(ctx context.Context, r *io.SectionReader, u *uploader, b *builder) error {
	// Its table of contents is read into memory.
	table := &tableReader{r: r, left: maxTableBytes}
	z, err := zip.NewReader(table, r.Size())
	if f, ok := errors.AsType[*FetchError](err); ok {
		return f
	}
	if err != nil {
		return malformed(err)
	}
	table.open = true
	for _, f := range z.File {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := unpackZipped(ctx, f, u, b); err != nil {
			return err
		}
	}
	return nil
}

// maxTableBytes bounds the table of contents of a zip file: a million files with
// names of some 80 bytes.
const maxTableBytes = 128 << 20

// tableReader bounds what is read until it is open.
type tableReader struct {
	r    io.ReaderAt
	left int64
	open bool
}

// ReadAt implements io.ReaderAt.
func (t *tableReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := t.r.ReadAt(p, off)
	if t.open {
		return n, err
	}
	if t.left -= int64(n); t.left < 0 {
		return 0, failed(TooLarge, "its table of contents has more than %d bytes", maxTableBytes)
	}
	return n, err
}

func unpackZipped(ctx context.Context, f *zip.File, u *uploader, b *builder) error {
	mode := f.Mode()
	if mode.IsDir() {
		return b.directory(f.Name)
	}
	r, err := f.Open()
	if err != nil {
		return malformed(err)
	}
	defer r.Close() //nolint:errcheck // opened for reading
	switch {
	case mode&fs.ModeSymlink != 0:
		target, err := io.ReadAll(io.LimitReader(reading{ctx, r}, maxPathBytes+1))
		if err != nil {
			return err
		}
		return b.link(f.Name, string(target))
	case mode.IsRegular():
		var d digest.Digest
		if d, err = u.file(ctx, reading{ctx, r}); err != nil {
			return err
		}
		return b.file(f.Name, file{digest: d, executable: mode&0o111 != 0})
	}
	return failed(Aborted, "%.200q is neither a file nor a directory nor a symlink", f.Name)
}
