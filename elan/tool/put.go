package tool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// puts is how many blobs are put at once: as fetches.
const puts = 8

// Put puts what is at path into s: a file as a blob, a directory as Directories
// and the blobs of their files. What s has already is not sent. It returns the
// digest of the file, or of the root Directory.
func Put(ctx context.Context, s blob.Store, fn digest.Function, path string) (digest.Digest, error) {
	info, err := os.Stat(path)
	if err != nil {
		return digest.Digest{}, err //nolint:wrapcheck // it names the path
	}
	u := &upload{fn: fn, sources: map[digest.Digest]source{}}
	var d digest.Digest
	if info.IsDir() {
		d, err = u.directory(ctx, path)
	} else {
		d, err = u.file(path, info)
	}
	if err != nil {
		return digest.Digest{}, err
	}
	return d, u.send(ctx, s)
}

// PutStream puts what r has into s. Its digest has to be known before it is
// sent, so that it goes through a temporary file first.
func PutStream(ctx context.Context, s blob.Store, fn digest.Function, r io.Reader) (d digest.Digest, err error) {
	f, err := os.CreateTemp("", "elan-put-")
	if err != nil {
		return digest.Digest{}, err //nolint:wrapcheck // it names the path
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	if _, err := io.Copy(f, r); err != nil {
		return digest.Digest{}, err //nolint:wrapcheck // it says what it did
	}
	return Put(ctx, s, fn, f.Name())
}

// source is where the bytes of a blob are: in a file or, as they are few, here.
type source struct {
	path string // "": data has them
	data []byte
}

// upload gathers what is to be put.
type upload struct {
	fn      digest.Function
	sources map[digest.Digest]source
}

// file gathers the file at path, of which info tells.
func (u *upload) file(path string, info fs.FileInfo) (digest.Digest, error) {
	if !info.Mode().IsRegular() {
		return digest.Digest{}, fmt.Errorf("%s is a %v, want files, directories and symlinks", path, info.Mode().Type())
	}
	f, err := os.Open(path)
	if err != nil {
		return digest.Digest{}, err //nolint:wrapcheck // it names the path
	}
	defer f.Close() //nolint:errcheck // opened for reading
	h := u.fn.New(info.Size())
	n, err := io.Copy(h, f)
	if err != nil {
		return digest.Digest{}, err //nolint:wrapcheck // it names the path
	}
	if n != info.Size() {
		return digest.Digest{}, fmt.Errorf("%s: %w: it had %d bytes, and now %d", path, errChanged, info.Size(), n)
	}
	d := digest.FromHash(u.fn, h, n)
	u.sources[d] = source{path: path}
	return d, nil
}

// errChanged says that somebody writes to what is being put.
var errChanged = errors.New("it changed while it was read")

// directory gathers the directory at path and all below it.
func (u *upload) directory(ctx context.Context, path string) (digest.Digest, error) {
	if err := ctx.Err(); err != nil {
		return digest.Digest{}, err
	}
	entries, err := os.ReadDir(path) // sorted by the bytes of the names
	if err != nil {
		return digest.Digest{}, err //nolint:wrapcheck // it names the path
	}
	dir := &repb.Directory{}
	for _, e := range entries {
		if err := u.entry(ctx, dir, filepath.Join(path, e.Name()), e); err != nil {
			return digest.Digest{}, err
		}
	}
	d, data, err := digest.OfMessage(u.fn, dir)
	if err != nil {
		return digest.Digest{}, err //nolint:wrapcheck // it says what it is
	}
	u.sources[d] = source{data: data}
	return d, nil
}

// entry gathers one entry of a directory, and adds its node to dir.
func (u *upload) entry(ctx context.Context, dir *repb.Directory, path string, e fs.DirEntry) error {
	if !utf8.ValidString(e.Name()) {
		return fmt.Errorf("%q has a name that is not UTF-8, which a Directory can't hold", path)
	}
	switch {
	case e.IsDir():
		d, err := u.directory(ctx, path)
		if err != nil {
			return err
		}
		dir.Directories = append(dir.Directories, &repb.DirectoryNode{Name: e.Name(), Digest: d.Proto()})
	case e.Type()&fs.ModeSymlink != 0:
		target, err := os.Readlink(path)
		if err != nil {
			return err //nolint:wrapcheck // it names the path
		}
		dir.Symlinks = append(dir.Symlinks, &repb.SymlinkNode{Name: e.Name(), Target: target})
	default:
		info, err := e.Info()
		if err != nil {
			return err //nolint:wrapcheck // it names the path
		}
		d, err := u.file(path, info)
		if err != nil {
			return err
		}
		dir.Files = append(dir.Files, &repb.FileNode{Name: e.Name(), Digest: d.Proto(), IsExecutable: info.Mode()&0o111 != 0})
	}
	return nil
}

// send puts into s what it does not have.
func (u *upload) send(ctx context.Context, s blob.Store) error {
	ds := make([]digest.Digest, 0, len(u.sources))
	for d := range u.sources {
		ds = append(ds, d)
	}
	missing, err := s.FindMissing(ctx, ds)
	if err != nil {
		return err //nolint:wrapcheck // the store says what it did
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(puts)
	for _, d := range missing {
		group.Go(func() error { return u.sources[d].send(ctx, s, d) })
	}
	return group.Wait()
}

func (src source) send(ctx context.Context, s blob.Store, d digest.Digest) error {
	if src.path == "" {
		return blob.ReceiveBytes(ctx, s, d, src.data) //nolint:wrapcheck // it names the blob
	}
	f, err := os.Open(src.path)
	if err != nil {
		return err //nolint:wrapcheck // it names the path
	}
	defer f.Close() //nolint:errcheck // opened for reading
	err = blob.Receive(ctx, s, d, f)
	if errors.Is(err, blob.ErrCorrupt) {
		return fmt.Errorf("%s: %w: %w", src.path, errChanged, err)
	}
	return err //nolint:wrapcheck // it names the blob
}
