//go:build linux

package image

import "io"

// Unpack unpacks a tar into an empty directory.
func Unpack(r io.Reader, dir string, maxBytes int64, maxEntries int) (entries int, reserved int64, err error) {
	w, err := findWhiteouts(dir)
	if err != nil {
		return 0, 0, err
	}
	entries, err = unpack(r, unpackOptions{dir: dir, white: w, maxBytes: maxBytes, maxEntries: maxEntries, reserve: func(n int64) error {
		reserved += n
		return nil
	}})
	if err != nil {
		err = machineOrImage(err)
	}
	return entries, reserved, err
}

// AsFiles has whiteouts be files from now on, as on a file system that takes no
// devices.
func (c *Cache) AsFiles() { c.white = asFiles }

// HasFileWhiteouts reports whether the kernel knows those.
func HasFileWhiteouts() bool { return hasFileWhiteouts() }
