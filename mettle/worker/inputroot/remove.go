//go:build linux

package inputroot

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// Remove removes dir and all that is in it, also what a command made
// unreadable. It is no error if there is none. It never follows a symlink. It is
// called when nothing of the command runs any more.
func Remove(dir string) error {
	err := os.RemoveAll(dir)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	// Each directory is opened up before it is read.
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			_ = os.Chmod(path, 0o700) //nolint:gosec // our own, about to go
		}
		return nil
	})
	return os.RemoveAll(dir)
}
