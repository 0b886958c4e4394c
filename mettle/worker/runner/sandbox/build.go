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

// The helper has two threads that matter, in two mount namespaces. In that of the
// helper's own thread, "outside", there are the host's mounts, and beside them those
// of the sandbox. In that of the thread on which commands start, "inside", there is
// only the sandbox, which is the root there; what is mounted on it outside appears
// inside.
const (
	// outsideDir is where the namespace outside begins: a directory that each host
	// has. It is covered there, and nowhere else.
	outsideDir = "/tmp"
	// Outside there are these directories, and nothing else.
	hostDir    = "/host"
	sandboxDir = "/sandbox"
	// emptyFile, outside, is what a hidden file is covered by.
	emptyFile = "/empty"
)

// in is a path of the sandbox, outside.
func in(path string) string { return filepath.Join(sandboxDir, path) }

// on is a path of the host, outside.
func on(path string) string { return filepath.Join(hostDir, path) }

// build makes the file system that commands see.
func (c *cell) build() error {
	unix.Umask(0)
	veils := c.veils()
	groups, err := c.unified()
	if err != nil {
		return err
	}
	if err := c.openLayers(); err != nil {
		return err
	}
	if err := c.goOutside(); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", sandboxDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	if err := c.fill(); err != nil {
		return err
	}
	if !isDir(c.Root) {
		return fmt.Errorf("sandbox root %s: no such directory, or behind a symlink", c.Root)
	}
	if err := setAttributes(sandboxDir, unix.AT_RECURSIVE, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV); err != nil {
		return fmt.Errorf("make the host read-only: %w", err)
	}
	if err := c.mountDev(); err != nil {
		return fmt.Errorf("/dev: %w", err)
	}
	if err := c.mountProc(); err != nil {
		return fmt.Errorf("/proc: %w", err)
	}
	if err := c.draw(veils); err != nil {
		return err
	}
	if err := c.hideGroups(groups); err != nil {
		return err
	}
	if err := c.mountScratch(); err != nil {
		return err
	}
	if err := c.watchHidden(); err != nil {
		return err
	}
	// From now on, what is mounted there appears inside.
	if err := unix.Mount("", sandboxDir, "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share the sandbox's mounts: %w", err)
	}
	return nil
}

// goOutside moves the host's mounts to hostDir, of a root that has nothing else.
func (c *cell) goOutside() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", outsideDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=64k"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	for _, dir := range []string{hostDir, sandboxDir} {
		if err := os.Mkdir(outsideDir+dir, 0o755); err != nil { //nolint:gosec // nobody else is there
			return err
		}
	}
	if err := os.WriteFile(outsideDir+emptyFile, nil, 0); err != nil {
		return err
	}
	// The helper opens some of these.
	for _, dir := range []string{"/dev", "/proc"} {
		if err := os.Symlink(sandboxDir+dir, outsideDir+dir); err != nil {
			return err
		}
	}
	if err := unix.PivotRoot(outsideDir, outsideDir+hostDir); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if err := setAttributes("/", 0, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV); err != nil {
		return fmt.Errorf("make it read-only: %w", err)
	}
	var err error
	if c.host, err = unix.Open(hostDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return &os.PathError{Op: "open", Path: hostDir, Err: err}
	}
	return nil
}

// goInside has the calling thread see the sandbox and no other mount.
func goInside() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("new mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("follow the mounts outside: %w", err)
	}
	outside, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(outside) //nolint:errcheck // only a place
	if err := unix.Chdir(sandboxDir); err != nil {
		return err
	}
	// The old root comes to lie on the new one, from where it is taken away, with
	// the host's mounts.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Fchdir(outside); err != nil {
		return err
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the host's mounts: %w", err)
	}
	return unix.Chdir("/")
}

// fill puts into the sandbox what commands see of the host, or of layers.
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
	dirs := []string{"/proc", "/dev", "/tmp"}
	first, _, nested := strings.Cut(c.Root[1:], "/")
	if _, err := os.Lstat(on(first)); !nested || errors.Is(err, fs.ErrNotExist) {
		dirs = append(dirs, c.Root)
	}
	for _, dir := range dirs {
		if err := os.MkdirAll(in(dir), 0o755); err != nil { //nolint:gosec // everyone may look
			return err
		}
	}
	return nil
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
	entries, err := os.ReadDir(hostDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := "/" + e.Name()
		switch path {
		case "/proc", "/dev", "/tmp", c.Root:
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
		target, err := os.Readlink(on(path))
		if err != nil {
			return err
		}
		return os.Symlink(target, in(path))
	case mode.IsDir():
		if err := os.Mkdir(in(path), 0o755); err != nil { //nolint:gosec // it is covered at once
			return err
		}
		return bind(on(path), in(path), unix.MS_REC)
	case mode.IsRegular():
		if err := os.WriteFile(in(path), nil, 0o644); err != nil { //nolint:gosec // it is covered at once
			return err
		}
		return bind(on(path), in(path), 0)
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
		if err := bind(on(dev), in(dev), 0); err != nil {
			return err
		}
		// It is the host's, and may be the command's by its owner. A device can be
		// written to all the same.
		if err := setAttributes(in(dev), 0, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC); err != nil {
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
	// A process that a command could not trace, as it can't the helper, is not there:
	// anyone could read what is mounted outside. (Of 2, group 0 is exempt.)
	if err := unix.Mount("proc", in("/proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "hidepid=4"); err != nil {
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
		if err := bind(emptyFile, path, 0); err != nil {
			return err
		}
	}
	return nil
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
		c.scratch = append(c.scratch, s)
	}
	return nil
}
