package tool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Copy writes the bytes of d to w, and compares them with d on the way: where
// they are not d's, they are out already when the error says so.
func Copy(ctx context.Context, o blob.Opener, d digest.Digest, w io.Writer) error {
	r, err := o.Open(ctx, d, 0)
	if err != nil {
		return short(err, d)
	}
	defer r.Close() //nolint:errcheck // opened for reading
	if _, err := io.Copy(w, digest.NewVerifier(r, d)); err != nil {
		return fmt.Errorf("read blob %s: %w", d, err)
	}
	return nil
}

// Fetch makes the file path of the bytes of d. The file is there whole and
// verified, or it is as it was before.
func Fetch(ctx context.Context, o blob.Opener, d digest.Digest, path string) (err error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return fmt.Errorf("%s is a directory; name a file", path)
	}
	partial := partialName(path)
	f, err := os.OpenFile(partial, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o666) //nolint:gosec // as the umask has it
	if err != nil {
		return err //nolint:wrapcheck // it names the path
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(partial))
		}
	}()
	if err := errors.Join(Copy(ctx, o, d, f), f.Close()); err != nil {
		return err
	}
	return os.Rename(partial, path) //nolint:wrapcheck // it names both
}

// partialName is where what becomes path is while it is not whole.
func partialName(path string) string {
	dir, base := filepath.Split(filepath.Clean(path))
	return filepath.Join(dir, "."+base+".partial-"+strconv.Itoa(os.Getpid()))
}

// short is err in few words where d is not there, however many were on the way
// to that.
func short(err error, d digest.Digest) error {
	if errors.Is(err, blob.ErrNotFound) {
		return fmt.Errorf("blob %s: %w", d, blob.ErrNotFound)
	}
	return err
}
