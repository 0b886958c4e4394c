//go:build linux

package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/cgroup"
)

// A process that can open the directory of a control group of version 2, and belongs to
// the user who may divide it, can start others in it (clone3 with CLONE_INTO_CGROUP),
// and so leave its limits, though the mount is read-only. So commands of the worker's
// own user find those directories empty. What runtimes read of limits is there, of their
// own group: those are files.

// unified are the hierarchies that are to be hidden. It is called while paths are the
// host's.
func (c *cell) unified() ([]string, error) {
	if !c.SameUser || len(c.Layers) > 0 {
		return nil, nil // it may not, or nothing is the host's
	}
	all, err := cgroup.Unified()
	slices.Sort(all)
	return slices.Compact(all), err
}

// limitFiles are those that say what a process may use.
func limitFiles() []string {
	return []string{"cgroup.controllers", "cpu.max", "cpu.stat", "cpu.weight", "memory.current", "memory.events", "memory.high", "memory.low", "memory.max", "memory.peak", "memory.stat", "memory.swap.current", "memory.swap.max", "pids.current", "pids.max"}
}

// hideGroups covers the hierarchies mounted at those paths.
func (c *cell) hideGroups(mounts []string) error {
	for _, path := range mounts {
		if st, err := os.Lstat(in(path)); err != nil || !st.IsDir() {
			continue // it is hidden already
		}
		if err := unix.Mount("tmpfs", in(path), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=555,size=64k"); err != nil {
			return fmt.Errorf("hide %s: %w", path, err)
		}
		if isBelow(c.Group, path) {
			if err := showLimits(path, c.Group); err != nil {
				return fmt.Errorf("show the limits in %s: %w", c.Group, err)
			}
		}
		if err := setAttributes(in(path), unix.AT_RECURSIVE, unix.MOUNT_ATTR_RDONLY); err != nil {
			return fmt.Errorf("hide %s: %w", path, err)
		}
	}
	return nil
}

// showLimits makes the files of group appear, and that of the hierarchy's root that
// says which version this is.
func showLimits(root, group string) error {
	if err := os.MkdirAll(in(group), 0o555); err != nil { //nolint:gosec // everyone may look
		return err
	}
	paths := []string{filepath.Join(root, "cgroup.controllers")}
	for _, name := range limitFiles() {
		paths = append(paths, filepath.Join(group, name))
	}
	for _, path := range paths {
		if _, err := os.Lstat(on(path)); errors.Is(err, fs.ErrNotExist) {
			continue // an older kernel, or not this controller
		}
		if err := os.WriteFile(in(path), nil, 0o444); err != nil { //nolint:gosec // it is covered at once
			return err
		}
		if err := bind(on(path), in(path), 0); err != nil {
			return err
		}
	}
	return nil
}
