//go:build linux

package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// What covers a file is gone once the host renames another file over it, as who renews
// credentials does; and a symlink may lead to another one. So before each command,
// hidden files are looked at again.

// watchHidden notes which those are, and those that may come to be. It is called when all
// is hidden.
func (c *cell) watchHidden() error {
	if len(c.Layers) > 0 {
		return nil
	}
	if err := unix.Stat(emptyFile, &c.empty); err != nil {
		return &os.PathError{Op: "stat", Path: emptyFile, Err: err}
	}
	var err error
	if c.inside, err = unix.Open(sandboxDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return &os.PathError{Op: "open", Path: sandboxDir, Err: err}
	}
	for _, path := range c.Hide {
		if slices.Contains(c.Show, path) || !c.SameUser && slices.Contains(AlwaysHidden(), path) {
			continue // the latter are closed to others by their modes
		}
		if st, err := c.look(filepath.Dir(path)); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue // it is in what is hidden
		}
		if st, err := c.look(path); errors.Is(err, unix.ENOENT) || err == nil && c.isEmpty(&st) {
			c.watched = append(c.watched, path)
		}
	}
	return nil
}

func (c *cell) isEmpty(st *unix.Stat_t) bool { return st.Dev == c.empty.Dev && st.Ino == c.empty.Ino }

// hideAgain covers what has come to be seen.
func (c *cell) hideAgain() error {
	for _, path := range c.watched {
		fd, err := c.open(path)
		if err != nil {
			continue // nobody can see it
		}
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && !c.isEmpty(&st) {
			err = bind(emptyFile, pathOf(fd), 0)
		}
		unix.Close(fd) //nolint:errcheck // only a place
		if err != nil {
			return fmt.Errorf("hide %s again: %w", path, err)
		}
	}
	return nil
}

// open finds what commands find at path.
func (c *cell) open(path string) (int, error) {
	return unix.Openat2(c.inside, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
}

func (c *cell) look(path string) (st unix.Stat_t, err error) {
	fd, err := c.open(path)
	if err != nil {
		return st, err
	}
	defer unix.Close(fd) //nolint:errcheck // only a place
	return st, unix.Fstat(fd, &st)
}
