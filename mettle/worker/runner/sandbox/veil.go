//go:build linux

package sandbox

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// veil is a path of the host that commands find empty, or below such a one that they
// see all the same. It has no symlinks: those are the host's, and lead to the same in
// the sandbox.
type veil struct {
	path  string
	shown bool
}

// resolvConf says whom to ask for names. It may be a symlink to what is hidden.
const resolvConf = "/etc/resolv.conf"

// veils lists what is hidden and shown, parents before children. Of what is both, the
// last counts.
func (c *cell) veils() []veil {
	if len(c.Layers) > 0 {
		return nil // nothing is the host's
	}
	var all []veil
	add := func(path string, shown bool) {
		if target, err := filepath.EvalSymlinks(path); err == nil {
			all = append(all, veil{target, shown})
		}
	}
	for _, p := range c.Hide {
		add(p, false)
	}
	shown := c.Show
	if !c.OwnNetwork {
		shown = append(slices.Clone(shown), resolvConf)
	}
	for _, p := range shown {
		add(p, true)
	}
	slices.SortStableFunc(all, func(a, b veil) int { return cmp.Or(strings.Compare(a.path, b.path)) })
	last := all[:0]
	for i, v := range all {
		if i+1 == len(all) || all[i+1].path != v.path {
			last = append(last, v)
		}
	}
	return last
}

// draw hides and shows.
func (c *cell) draw(veils []veil) error {
	var covered []string // by an empty directory, which is to be read-only
	for _, v := range veils {
		if v.shown {
			if err := show(v.path); err != nil {
				return fmt.Errorf("show %s: %w", v.path, err)
			}
			continue
		}
		dir, err := c.hide(v.path)
		if err != nil {
			return fmt.Errorf("hide %s: %w", v.path, err)
		}
		if dir {
			covered = append(covered, v.path)
		}
	}
	for _, path := range covered {
		if err := setAttributes(in(path), 0, unix.MOUNT_ATTR_RDONLY); err != nil {
			return fmt.Errorf("hide %s: %w", path, err)
		}
	}
	return nil
}

// hide covers a file or directory of the host, and says which.
func (c *cell) hide(path string) (dir bool, err error) {
	if isBelow(c.Root, path) {
		return false, fmt.Errorf("the sandbox's root %s is in it", c.Root)
	}
	st, err := os.Lstat(in(path))
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return false, nil // it is in what is covered already
	case err != nil:
		return false, err
	case st.IsDir():
		return true, unix.Mount("tmpfs", in(path), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=555,size=64k")
	default:
		return false, bind(emptyFile, in(path), 0)
	}
}

// show makes a path of the host appear that lies in what is hidden. Elsewhere it is
// there already.
func show(path string) error {
	if _, err := os.Lstat(in(path)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(in(filepath.Dir(path)), 0o555); err != nil { //nolint:gosec // everyone may look
		return err
	}
	st, err := os.Stat(on(path))
	switch {
	case err != nil:
		return err
	case st.IsDir():
		err = os.Mkdir(in(path), 0o555) //nolint:gosec // it is covered at once
	case st.Mode().IsRegular():
		err = os.WriteFile(in(path), nil, 0o444) //nolint:gosec // it is covered at once
	default:
		return fmt.Errorf("%w: neither a file nor a directory", fs.ErrInvalid)
	}
	if err != nil {
		return err
	}
	if err := bind(on(path), in(path), unix.MS_REC); err != nil {
		return err
	}
	return setAttributes(in(path), unix.AT_RECURSIVE, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
}
