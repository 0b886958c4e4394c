//go:build linux

package inputroot

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Remove removes dir and all that is in it, also what a command made
// unreadable or immutable. It is no error if there is none. It never follows a symlink. It is
// called when nothing of the command runs any more.
func Remove(dir string) error {
	err := os.RemoveAll(dir)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	// Each directory is opened up before it is read.
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // the removal will tell
		}
		if e.IsDir() || e.Type().IsRegular() {
			clearFlags(path)
		}
		if e.IsDir() {
			_ = os.Chmod(path, 0o700) //nolint:gosec // our own, about to go
		}
		return nil
	})
	return os.RemoveAll(dir)
}

// fixedFlags are the flags of chattr that keep a file from being removed: immutable,
// and append-only. Root can set them, so a command that runs as root can.
const fixedFlags = 0x10 | 0x20

func clearFlags(path string) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err == nil && flags&fixedFlags != 0 {
		_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags&^fixedFlags)
	}
}
