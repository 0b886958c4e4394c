//go:build linux

package sandbox

import (
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// cover is a hidden file as it was when it was covered. What replaces it by a rename
// takes the cover with it, as the kernel has it: nobody who mounts over a file may keep
// its owner from replacing it.
type cover struct {
	path string
	was  inode // the zero one: there was nothing to cover
}

// inode tells files apart, also one that has the number of one that was removed.
type inode struct {
	major, minor uint32
	number       uint64
	born         unix.StatxTimestamp
}

// inodeOf is the zero inode where there is nothing.
func inodeOf(path string) (i inode, isDir bool) {
	var s unix.Statx_t
	if unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_TYPE|unix.STATX_INO|unix.STATX_BTIME, &s) != nil {
		return inode{}, false
	}
	return inode{s.Dev_major, s.Dev_minor, s.Ino, s.Btime}, s.Mode&unix.S_IFMT == unix.S_IFDIR
}

// covers are the hidden paths that may come to be seen. In directories that are covered
// nothing can.
func (c *config) covers() []cover {
	if len(c.Layers) > 0 {
		return nil // nothing is the host's
	}
	var dirs []string
	var all []cover
	for _, p := range c.Hide {
		if i, isDir := inodeOf(p); isDir {
			dirs = append(dirs, p+"/")
		} else {
			all = append(all, cover{p, i})
		}
	}
	return slices.DeleteFunc(all, func(v cover) bool {
		return slices.ContainsFunc(dirs, func(dir string) bool { return strings.HasPrefix(v.path, dir) }) &&
			!slices.ContainsFunc(c.Show, func(p string) bool { return isBelow(v.path, p) })
	})
}

// Stale reports whether a hidden file was replaced, or made, since New, so that commands
// can see it: the Runner is to be replaced then too, before the next one runs.
func (r *Runner) Stale() bool {
	return slices.ContainsFunc(r.covers, func(v cover) bool {
		now, _ := inodeOf(v.path)
		return now != (inode{}) && now != v.was
	})
}
