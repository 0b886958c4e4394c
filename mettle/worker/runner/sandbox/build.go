//go:build linux

package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// staging is where the new root is put together, before it becomes the
	// root: a directory that each host has, and of which commands see nothing.
	staging = "/tmp"
	// hostName is where the host's root goes, under an empty directory.
	hostName = "/.host"
	// emptyName is what a hidden file is replaced by.
	emptyName = "/.hidden"
)

// in is a path of the sandbox, while that is in staging.
func in(path string) string { return filepath.Join(staging, path) }

// build makes the file system that commands see, and moves there.
func (c *cell) build() error {
	unix.Umask(0)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	hidden := c.resolve()
	if err := c.openLayers(); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", staging, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	if err := c.fill(); err != nil {
		return err
	}
	if !isDir(c.Root) {
		return fmt.Errorf("sandbox root %s: no such directory, or behind a symlink", c.Root)
	}
	if err := setAttributes(staging, unix.AT_RECURSIVE, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV); err != nil {
		return fmt.Errorf("make the host read-only: %w", err)
	}
	if err := c.mountDev(); err != nil {
		return fmt.Errorf("/dev: %w", err)
	}
	if err := c.mountProc(); err != nil {
		return fmt.Errorf("/proc: %w", err)
	}
	for _, p := range hidden {
		if err := c.hide(p); err != nil {
			return fmt.Errorf("hide %s: %w", p, err)
		}
	}
	if err := c.mountScratch(); err != nil {
		return err
	}
	return c.pivot()
}

// fill puts into staging what commands see of the host, or of layers.
func (c *cell) fill() error {
	if len(c.Layers) > 0 {
		return c.overlayLayers()
	}
	if err := c.makeOwn(); err != nil {
		return err
	}
	if err := c.bindHost(); err != nil {
		return fmt.Errorf("bind the host's directories: %w", err)
	}
	return nil
}

// makeOwn makes what is not the host's, before anything of the host is there to
// be written to.
func (c *cell) makeOwn() error {
	dirs := []string{"/proc", "/dev", "/tmp", hostName}
	first, _, nested := strings.Cut(c.Root[1:], "/")
	if _, err := os.Lstat("/" + first); !nested || errors.Is(err, fs.ErrNotExist) {
		dirs = append(dirs, c.Root)
	}
	for _, dir := range dirs {
		if err := os.MkdirAll(in(dir), 0o755); err != nil { //nolint:gosec // everyone may look
			return err
		}
	}
	return os.WriteFile(in(emptyName), nil, 0)
}

// isDir reports whether there is a directory at path in the sandbox, not behind a
// symlink: an absolute one would lead to the host's.
func isDir(path string) bool {
	fd, err := unix.Openat2(unix.AT_FDCWD, in(path), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return false
	}
	unix.Close(fd) //nolint:errcheck // only a place
	return true
}

// bindHost makes the entries of the host's root appear in the sandbox.
func (c *cell) bindHost() error {
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := "/" + e.Name()
		switch path {
		case "/proc", "/dev", "/tmp", hostName, emptyName, c.Root:
			continue
		}
		err := bindEntry(path, e.Type())
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // it has gone meanwhile
			return err
		}
	}
	return nil
}

func bindEntry(path string, mode fs.FileMode) error {
	switch {
	case mode&fs.ModeSymlink != 0:
		target, err := os.Readlink(path)
		if err != nil {
			return err
		}
		return os.Symlink(target, in(path))
	case mode.IsDir():
		if err := os.Mkdir(in(path), 0o755); err != nil { //nolint:gosec // it is covered at once
			return err
		}
		return bind(path, in(path), unix.MS_REC)
	case mode.IsRegular():
		if err := os.WriteFile(in(path), nil, 0o644); err != nil { //nolint:gosec // it is covered at once
			return err
		}
		return bind(path, in(path), 0)
	}
	return nil // sockets and the like
}

func bind(from, to string, flags uintptr) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND|flags, ""); err != nil {
		return &os.PathError{Op: "bind", Path: from, Err: err}
	}
	return nil
}

func setAttributes(path string, flags uint, attrs uint64) error {
	return unix.MountSetattr(unix.AT_FDCWD, path, flags, &unix.MountAttr{Attr_set: attrs})
}

// mountDev makes the devices that every program may use, and nothing else.
func (c *cell) mountDev() error {
	if err := unix.Mount("tmpfs", in("/dev"), "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755,size=64k"); err != nil {
		return err
	}
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		dev := "/dev/" + name
		if err := os.WriteFile(in(dev), nil, 0o666); err != nil { //nolint:gosec // it is covered at once
			return err
		}
		if err := bind(dev, in(dev), 0); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(target, in("/dev/"+name)); err != nil {
			return err
		}
	}
	for _, name := range []string{"pts", "shm"} {
		if err := os.Mkdir(in("/dev/"+name), 0o755); err != nil { //nolint:gosec // it is covered at once
			return err
		}
	}
	if err := unix.Mount("devpts", in("/dev/pts"), "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620"); err != nil {
		return fmt.Errorf("pts: %w", err)
	}
	return setAttributes(in("/dev"), 0, unix.MOUNT_ATTR_RDONLY)
}

// mountProc makes the /proc of the PID namespace, of which commands can change
// nothing but what is their own.
func (c *cell) mountProc() error {
	if err := unix.Mount("proc", in("/proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	// In a user namespace of its own, a command could mount, and reach parts of
	// the kernel that users cannot.
	if err := os.WriteFile(in("/proc/sys/user/max_user_namespaces"), []byte("0"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forbid user namespaces: %w", err)
	}
	for _, name := range []string{"sys", "sysrq-trigger", "irq", "bus", "fs", "acpi", "scsi"} {
		path := in("/proc/" + name)
		if _, err := os.Lstat(path); err != nil {
			continue
		}
		if err := bind(path, path, unix.MS_REC); err != nil {
			return err
		}
		if err := setAttributes(path, unix.AT_RECURSIVE, unix.MOUNT_ATTR_RDONLY); err != nil {
			return fmt.Errorf("make %s read-only: %w", name, err)
		}
	}
	for _, name := range []string{"kcore", "keys", "timer_list"} {
		path := in("/proc/" + name)
		if _, err := os.Lstat(path); err != nil {
			continue
		}
		if err := bind(in(emptyName), path, 0); err != nil {
			return err
		}
	}
	return nil
}

// resolve lists the hidden paths without symlinks: those are the host's, and lead
// to the same in the sandbox.
func (c *cell) resolve() []string {
	var paths []string
	if len(c.Layers) > 0 {
		return nil // nothing is the host's
	}
	for _, p := range c.Hide {
		if target, err := filepath.EvalSymlinks(p); err == nil {
			paths = append(paths, target)
		}
	}
	return paths
}

// hide covers a file or directory of the host.
func (c *cell) hide(path string) error {
	if rel, err := filepath.Rel(path, c.Root); err == nil && filepath.IsLocal(rel) {
		return fmt.Errorf("the sandbox's root %s is in it", c.Root)
	}
	st, err := os.Lstat(in(path))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // it is in what is covered already
	case err != nil:
		return err
	case st.IsDir():
		return unix.Mount("tmpfs", in(path), "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=555,size=4k")
	default:
		return bind(in(emptyName), in(path), 0)
	}
}

// mountScratch makes the directories that commands can write to, beside their
// root.
func (c *cell) mountScratch() error {
	for _, path := range []string{"/tmp", "/var/tmp", "/dev/shm"} {
		if !isDir(path) || strings.HasPrefix(c.Root+"/", path+"/") {
			continue // a symlink, to /tmp say
		}
		s := scratch{path: in(path), data: fmt.Sprintf("mode=%o,size=%d", scratchMode, c.TmpBytes)}
		if err := s.mount(); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		s.path = path
		c.scratch = append(c.scratch, s)
	}
	return nil
}

// pivot makes staging the root. The host's goes under a directory that is empty
// and that no command can unmount; only the helper has a descriptor of it, to
// reach input roots and the files for output.
func (c *cell) pivot() error {
	if err := unix.PivotRoot(staging, in(hostName)); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if len(c.Layers) > 0 {
		// The tmpfs that was under the overlay still covers the host's directory.
		if err := unix.Unmount(filepath.Join(hostName, staging), unix.MNT_DETACH); err != nil {
			return fmt.Errorf("uncover the host's %s: %w", staging, err)
		}
	}
	var err error
	if c.host, err = unix.Open(hostName, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return &os.PathError{Op: "open", Path: hostName, Err: err}
	}
	if err := unix.Mount("tmpfs", hostName, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=555,size=4k"); err != nil {
		return fmt.Errorf("cover the host's root: %w", err)
	}
	return nil
}
