//go:build linux

package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
	"github.com/mettle-build/mettle/mettle/worker/runner/seccomp"
)

// cell is the helper.Setting of a sandbox, in the helper, which is in all the new
// namespaces from its start.
type cell struct {
	config
	host    int // the host's root directory
	bound   *unix.Stat_t
	scratch []scratch
	opened  []int             // Layers, while the root is built
	names   map[string]string // files of /etc, for Layers, likewise
	watched []string          // hidden files
	empty   unix.Stat_t       // what covers them
	inside  int               // the sandbox's root
	network *network          // nil: the host's. It is used on the commands' thread.
}

var _ helper.Confiner = (*cell)(nil)

// Enter implements helper.Setting.
func (c *cell) Enter(text string, _ helper.User) error {
	if err := json.Unmarshal([]byte(text), &c.config); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if os.Getpid() != 1 {
		return errors.New("not the first process of a PID namespace")
	}
	if err := c.build(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(c.Hostname)); err != nil {
		return fmt.Errorf("set the host's name: %w", err)
	}
	return nil
}

// Confine implements helper.Confiner.
func (c *cell) Confine(s helper.Start) error {
	if err := goInside(); err != nil {
		return err
	}
	unix.Umask(0o022) // that of the rest is no longer this thread's
	if c.OwnNetwork {
		c.network = &network{}
		if err := c.network.open(); err != nil {
			return err
		}
	}
	// Keys of the worker's session are not for commands. Where there are no
	// keyrings there is nothing to hide.
	_, _ = unix.KeyctlJoinSessionKeyring("")
	if err := dropPrivileges(); err != nil {
		return err
	}
	if !c.OwnNetwork {
		if err := keepFromAbstractSockets(); err != nil {
			return err
		}
	}
	return c.filterSyscalls(s)
}

// filterSyscalls is the last thing that the thread does for itself.
func (c *cell) filterSyscalls(s helper.Start) error {
	switch {
	case c.AllSyscalls:
		return nil
	case s.IntoGroup:
		return seccomp.Install(seccomp.CloneInto)
	default:
		return seccomp.Install(seccomp.Clone)
	}
}

// Seen implements helper.Confiner.
func (c *cell) Seen(path string) string { return in(path) }

// Renew implements helper.Confiner.
func (c *cell) Renew() error {
	if err := unix.Unshare(unix.CLONE_NEWIPC); err != nil {
		return fmt.Errorf("new IPC namespace: %w", err)
	}
	if c.network == nil {
		return nil
	}
	return c.network.renew()
}

// dropPrivileges takes from the children of this thread what the helper itself
// keeps: a command has no capabilities, whoever it is, and gets none by what it
// executes.
func dropPrivileges() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no new privileges: %w", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear the ambient capabilities: %w", err)
	}
	for n := range uintptr(64) {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, n, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) && n > 0 {
			break // there are no more
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", n, err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read the capabilities: %w", err)
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("clear the inheritable capabilities: %w", err)
	}
	return nil
}

// OpenDir implements helper.Setting.
func (c *cell) OpenDir(path string) (int, error) {
	for {
		fd, err := unix.Openat2(c.host, strings.TrimPrefix(path, "/"), &unix.OpenHow{
			Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT,
		})
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return fd, err
		}
	}
}

// KillAll implements helper.Setting. The kernel holds off forks while it goes
// through the processes of the namespace, and spares its init.
func (c *cell) KillAll() bool {
	_ = unix.Kill(-1, unix.SIGKILL)
	return true
}

// Prepare implements helper.Setting.
func (c *cell) Prepare(spec *runner.Spec) error {
	rel, err := filepath.Rel(spec.Root, spec.Dir)
	if err != nil || !filepath.IsLocal(rel) {
		return fmt.Errorf("working directory %s is not in the root %s", spec.Dir, spec.Root)
	}
	for i := range c.scratch {
		if err := c.scratch[i].renew(); err != nil {
			return fmt.Errorf("renew %s: %w", c.scratch[i].path, err)
		}
	}
	if err := c.hideAgain(); err != nil {
		return err
	}
	if err := c.bind(spec.Root); err != nil {
		return &os.PathError{Op: "bind", Path: spec.Root, Err: err}
	}
	spec.Root, spec.Dir = c.Root, filepath.Join(c.Root, rel)
	return nil
}

// bind makes the action's root what commands see at c.Root, unless it is. The one
// that is bound lives on if it was removed, so its inode number is no one else's.
func (c *cell) bind(root string) error {
	fd, err := c.OpenDir(root)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // only a place
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if c.bound != nil {
		if c.bound.Dev == st.Dev && c.bound.Ino == st.Ino {
			return nil
		}
		if err := unix.Unmount(in(c.Root), unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount the last one: %w", err)
		}
		c.bound = nil
	}
	// With its attributes before it appears inside, where they would not follow.
	tree, err := unix.OpenTree(fd, "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(tree) //nolint:errcheck // only a place
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return err
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, in(c.Root), unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return err
	}
	c.bound = &st
	return nil
}

// scratch is a tmpfs that commands write to.
type scratch struct {
	path    string
	data    string
	mounted bool
	uid     uint32
	gid     uint32
}

const scratchMode = 0o1777

func (s *scratch) mount() error {
	if err := unix.Mount("tmpfs", s.path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, s.data); err != nil {
		return err
	}
	s.mounted = true
	var st unix.Stat_t
	err := unix.Stat(s.path, &st)
	s.uid, s.gid = st.Uid, st.Gid
	return err
}

// renew gives the next command an empty one.
func (s *scratch) renew() error {
	if s.mounted && s.isClean() {
		return nil
	}
	if s.mounted {
		if err := unix.Unmount(s.path, unix.MNT_DETACH); err != nil {
			return err
		}
		s.mounted = false
	}
	return s.mount()
}

// isClean reports whether a command could find a trace of another.
func (s *scratch) isClean() bool {
	fd, err := unix.Open(s.path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&0o7777 != scratchMode || st.Uid != s.uid || st.Gid != s.gid {
		return false
	}
	// To the end: a read that a signal interrupts, as the runtime sends them to its
	// own threads, may return the dots alone.
	var entries [512]byte
	for {
		n, err := unix.Getdents(fd, entries[:])
		if err != nil || len(direntNames(entries[:max(n, 0)])) > 0 {
			return false
		}
		if n == 0 {
			break
		}
	}
	var attributes [1]byte
	size, err := unix.Flistxattr(fd, attributes[:0])
	return err == nil && size == 0 || errors.Is(err, unix.ENOTSUP)
}

func direntNames(b []byte) []string {
	_, _, names := unix.ParseDirent(b, -1, nil)
	return names
}
