//go:build linux

package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A root of layers is one overlay of them, read-only, with a layer of our own on
// top, which holds the places where something is mounted: an image need not have
// them.

// MaxLayers bounds Options.Layers. The kernel takes some more, and Docker makes no
// image of more than half as many.
const MaxLayers = 256

// What is in the tmpfs under the overlay: links to the layers, whose names are
// short enough for all of them to fit into one page of mount options, and our own
// layer.
const (
	linksName = "links"
	topName   = "top"
)

// checkLayers checks Options.Layers.
func checkLayers(layers []string) error {
	if len(layers) > MaxLayers {
		return fmt.Errorf("%w: %d layers, %d at most", ErrOptions, len(layers), MaxLayers)
	}
	for _, l := range layers {
		if !filepath.IsAbs(l) {
			return fmt.Errorf("%w: layer %q is no absolute path", ErrOptions, l)
		}
	}
	return nil
}

// openLayers opens the layers, and reads what names the host's network, while their paths lead there.
func (c *cell) openLayers() error {
	for _, l := range c.Layers {
		fd, err := unix.Open(l, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: l, Err: err}
		}
		c.opened = append(c.opened, fd)
	}
	if len(c.Layers) == 0 || c.OwnNetwork {
		return nil
	}
	c.names = map[string]string{}
	for _, name := range []string{"resolv.conf", "hosts"} {
		data, err := os.ReadFile(filepath.Join("/etc", name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		c.names[name] = string(data)
	}
	return nil
}

// pathOf is a path that leads to what is open.
func pathOf(fd int) string { return on(fmt.Sprintf("/proc/self/fd/%d", fd)) }

// overlayLayers covers the tmpfs of the sandbox, with the overlay.
func (c *cell) overlayLayers() error {
	for _, dir := range []string{linksName, topName} {
		if err := os.Mkdir(filepath.Join(sandboxDir, dir), 0o755); err != nil { //nolint:gosec // it becomes the command's root
			return err
		}
	}
	if err := c.makeTop(filepath.Join(sandboxDir, topName)); err != nil {
		return fmt.Errorf("the layer for mounts: %w", err)
	}
	lower := []string{"../" + topName}
	for i, fd := range slices.Backward(c.opened) {
		name := strconv.Itoa(i)
		if err := os.Symlink(pathOf(fd), filepath.Join(sandboxDir, linksName, name)); err != nil {
			return err
		}
		lower = append(lower, name)
	}
	if err := unix.Chdir(filepath.Join(sandboxDir, linksName)); err != nil {
		return err
	}
	// userxattr: whiteouts and the like are in attributes that a user namespace may
	// have, see package image.
	err := unix.Mount("overlay", sandboxDir, "overlay", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "userxattr,lowerdir="+strings.Join(lower, ":"))
	if err != nil {
		return fmt.Errorf("mount an overlay of %d layers: %w", len(c.Layers), err)
	}
	for _, fd := range c.opened {
		unix.Close(fd) //nolint:errcheck // only a place
	}
	c.opened = nil
	return unix.Chdir("/")
}

// makeTop makes our own layer.
func (c *cell) makeTop(top string) error {
	dirs := []string{"/proc", "/dev", "/tmp", c.Root}
	for _, dir := range []string{"/var/tmp", "/etc"} {
		if c.canHold(dir) {
			dirs = append(dirs, dir)
		}
	}
	for _, dir := range dirs {
		if err := os.MkdirAll(filepath.Join(top, dir), 0o755); err != nil { //nolint:gosec // everyone may look
			return err
		}
	}
	if !c.canHold("/etc") {
		return nil
	}
	files := map[string]string{
		"resolv.conf": "",
		"hosts":       "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.0.1\t" + c.Hostname + "\n",
	}
	for name, text := range files {
		if !c.OwnNetwork {
			text = c.names[name]
		}
		if err := os.WriteFile(filepath.Join(top, "etc", name), []byte(text), 0o644); err != nil { //nolint:gosec // everyone may look
			return err
		}
	}
	return nil
}

// canHold reports whether our own layer can have a directory of the image: it is
// none that is something else there, a symlink say, which it would replace.
func (c *cell) canHold(dir string) bool {
	for d := dir; d != "/"; d = filepath.Dir(d) {
		for _, fd := range slices.Backward(c.opened) {
			st, err := os.Lstat(pathOf(fd) + d)
			if err != nil {
				continue // not in this layer
			}
			if !st.IsDir() {
				return st.Mode()&fs.ModeCharDevice != 0 // it was removed
			}
			break
		}
	}
	return true
}
