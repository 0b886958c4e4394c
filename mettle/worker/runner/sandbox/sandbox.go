//go:build linux

// Package sandbox runs commands in Linux namespaces that it makes itself: user,
// mount, PID, IPC, UTS and network. A command sees the host's file system
// read-only, without what is hidden from it; its own /tmp, /var/tmp, /dev and
// /proc; its inputs at a fixed path, the only place of the host that it can
// write to; a loopback interface and no other; no process but its own. It has no
// capability, gains none by executing anything, and can make no user namespace.
// It takes neither root, where the kernel lets users make user namespaces, nor
// any other program. Memory, CPU time and the number of processes are bounded by
// Bounds alone. System calls that no build needs are refused: see runner/seccomp.
//
// Each Runner has one helper process for all its commands (see runner/helper),
// which is the init of the PID namespace. It mounts, in a namespace that has the
// host's mounts too; commands start on a thread of their own, whose mount namespace
// has the sandbox's and no other, and which has given up what they may not have. So
// neither a path nor /proc/self/mountinfo leads out, but that the kernel says of each
// mount where it begins on its file system. Of the helper, /proc shows nothing.
//
// Between two commands it kills, in one
// system call that no fork can outrun, everything in that namespace, and renews
// what one command could leave for the next: the IPC namespace, and the tmpfs
// that are not empty. All that takes some tens of microseconds, where new
// namespaces would take more than the command. The network namespace is renewed where
// a connection of the last command lingers in it, which would keep its port. When the helper dies,
// however it dies, the kernel kills the rest.
//
// main, and TestMain of each test that runs commands, begin with
//
//	if sandbox.IsHelper() {
//		os.Exit(sandbox.HelperMain())
//	}
//
// It needs Linux 5.12 (mount_setattr). Where New fails, this machine does not
// allow a sandbox, and the error says what was refused. Its caller is the worker.
package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
)

// DefaultRoot is where a command sees its input root.
const DefaultRoot = "/build"

// Network is what of the network a command sees.
type Network int

// What a command can see.
const (
	NoNetwork   Network = iota // loopback of its own
	HostNetwork                // that of the worker
)

// Syscalls is which system calls a command may make.
type Syscalls int

// The choices.
const (
	UsualSyscalls Syscalls = iota // all but those that package seccomp refuses
	AllSyscalls
)

// Identity is what a command takes its user for.
type Identity int

// The choices.
const (
	AsWorker Identity = iota
	// AsNobody: 65534, whoever it is outside.
	AsNobody
)

// nobody is the number of the user whom nothing belongs to.
const nobody = 65534

// Options say how commands run.
type Options struct {
	// User, if set, is whom commands run as, without supplementary groups. It
	// takes root to set it. Otherwise they run as the user of the worker.
	User helper.User
	// Identity is what commands are called that run as the user of the worker. It is
	// AsWorker unless set.
	Identity Identity
	// Root is where a command sees its input root. Default: DefaultRoot. Its
	// first part should be no directory of the host: that would be covered, and
	// where it has two parts or more, they must be there already.
	Root string
	// Layers, if there are any, are directories that make up what commands see in
	// place of the host's file system, the lowest first: those of an image, as
	// package image unpacks them. They are neither written to nor may they change
	// while the Runner is there. Hide is of no account then.
	Layers []string
	// Hide are files and directories of the host that commands find empty,
	// beside those of AlwaysHidden. Those that do not exist are skipped.
	Hide []string
	// Show are files and directories of the host below hidden ones, or hidden ones,
	// that commands see all the same, read-only. They exist, and are not in
	// directories that are the sandbox's own. Of Layers, it is of no account.
	Show []string
	// Network is NoNetwork unless set.
	Network Network
	// Syscalls are UsualSyscalls unless set.
	Syscalls Syscalls
	// Hostname is what commands see. Default: "localhost".
	Hostname string
	// TmpBytes bounds each of /tmp, /var/tmp and /dev/shm, which are in memory.
	// Default 1 GiB.
	TmpBytes int64
	// KillTimeout bounds the time to kill what a command leaves behind; where
	// that doesn't do, Run fails. Default 10 s.
	KillTimeout time.Duration
	// Bounds are what commands are held to. Of the bytes on the disk as many may be
	// in each of /tmp, /var/tmp and /dev/shm, if TmpBytes are not fewer.
	Bounds helper.Bounds
	// Streams, if set, are those of the one command that the Runner runs.
	Streams *runner.Streams
	// Logger gets what goes wrong with the helper. Default: discard.
	Logger *slog.Logger
}

// ErrOptions: no machine could make the sandbox that was asked for.
var ErrOptions = errors.New("options of the sandbox")

// AlwaysHidden lists what no command has any business with: homes, the sockets
// of services, and the files that only root may read, which a worker that runs
// commands as root could.
func AlwaysHidden() []string {
	return []string{"/home", "/root", "/run", "/var/run", "/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-", "/etc/sudoers", "/etc/sudoers.d", "/etc/ssl/private"}
}

// Runner implements runner.Runner. It is used by one goroutine at a time.
type Runner struct {
	*helper.Runner
	filtered bool // by package seccomp
}

var _ runner.Runner = (*Runner)(nil)

// helperName is what this program is called when it is not itself.
const helperName = "mettle-sandbox-helper"

// config is Options as the helper gets them.
type config struct {
	Root, Hostname string
	Hide, Show     []string
	Layers         []string
	TmpBytes       int64
	OwnNetwork     bool
	SameUser       bool   // commands are the helper's own user
	Group          string // the directory of Bounds.Group in version 2
	AllSyscalls    bool
}

// New starts a Runner. The error wraps ErrOptions, or says which part of a sandbox
// the machine does not allow.
func New(opts Options) (*Runner, error) {
	c := config{Layers: opts.Layers, Root: opts.Root, Hostname: opts.Hostname, TmpBytes: opts.TmpBytes, OwnNetwork: opts.Network == NoNetwork, AllSyscalls: opts.Syscalls == AllSyscalls}
	if c.Root == "" {
		c.Root = DefaultRoot
	}
	if c.Hostname == "" {
		c.Hostname = "localhost"
	}
	if c.TmpBytes == 0 {
		c.TmpBytes = 1 << 30
	}
	if n := opts.Bounds.Limits.DiskBytes; n > 0 {
		c.TmpBytes = min(c.TmpBytes, n)
	}
	c.Hide, c.Show = append(AlwaysHidden(), opts.Hide...), opts.Show
	c.SameUser, c.Group = !opts.User.Set || opts.User.UID == os.Geteuid(), opts.Bounds.Group.Unified()
	if err := c.check(); err != nil {
		return nil, errors.Join(err, opts.Bounds.Group.Close())
	}
	data, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	r, err := helper.New(helper.Options{
		Name: helperName, Config: string(data), Attr: attributes(&opts), User: opts.User, KillTimeout: opts.KillTimeout,
		Bounds: opts.Bounds, Streams: opts.Streams, Logger: opts.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("sandbox: %w", err)
	}
	return &Runner{Runner: r, filtered: opts.Syscalls == UsualSyscalls}, nil
}

// exitFiltered is the exit code of what the filter of system calls has killed: 128 and
// SIGSYS.
const exitFiltered = 159

// Run implements runner.Runner.
func (r *Runner) Run(ctx context.Context, spec runner.Spec) (runner.Result, error) {
	res, err := r.Runner.Run(ctx, spec)
	if r.filtered && res.ExitCode == exitFiltered {
		res.Notes = append(res.Notes, "the command was killed by SIGSYS: the sandbox runs no programs of another kind of processor, 32-bit ones among them; a worker with --sandbox_syscalls=all does")
	}
	return res, err
}

func (c *config) check() error {
	if c.Root == "/" || !filepath.IsAbs(c.Root) || filepath.Clean(c.Root) != c.Root {
		return fmt.Errorf("%w: sandbox root %q is no clean absolute path below /", ErrOptions, c.Root)
	}
	switch first, _, _ := strings.Cut(c.Root[1:], "/"); first {
	case "proc", "dev", "tmp", "sys":
		return fmt.Errorf("%w: sandbox root %s: /%s is taken", ErrOptions, c.Root, first)
	}
	if len(c.Layers) == 0 {
		if err := checkHostRoot(c.Root); err != nil {
			return err
		}
	}
	for _, p := range c.Hide {
		if !filepath.IsAbs(p) || filepath.Clean(p) == "/" {
			return fmt.Errorf("%w: hidden path %q is no absolute path below /", ErrOptions, p)
		}
		if isBelow(c.Root, filepath.Clean(p)) {
			return fmt.Errorf("%w: hidden path %s: the sandbox's root %s is in it", ErrOptions, p, c.Root)
		}
	}
	for _, p := range c.Show {
		if err := checkShown(p); err != nil {
			return err
		}
	}
	if c.TmpBytes < 0 {
		return fmt.Errorf("%w: /tmp of %d bytes", ErrOptions, c.TmpBytes)
	}
	return checkLayers(c.Layers)
}

// checkHostRoot checks a root that lies in a directory of the host: there nothing can be
// made for it.
func checkHostRoot(root string) error {
	first, _, nested := strings.Cut(root[1:], "/")
	if _, err := os.Lstat("/" + first); !nested || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for dir := root; dir != "/"; dir = filepath.Dir(dir) {
		if info, err := os.Lstat(dir); err != nil || !info.IsDir() {
			return fmt.Errorf("%w: sandbox root %s: no such directory, or behind a symlink", ErrOptions, root)
		}
	}
	return nil
}

func checkShown(path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) == "/" {
		return fmt.Errorf("%w: shown path %q is no absolute path below /", ErrOptions, path)
	}
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("%w: shown path %s: %w", ErrOptions, path, err)
	}
	for _, own := range []string{"/proc", "/dev", "/tmp", "/var/tmp"} {
		if isBelow(target, own) {
			return fmt.Errorf("%w: shown path %s: each command has a %s of its own", ErrOptions, path, own)
		}
	}
	return nil
}

// isBelow reports whether path is dir or below it.
func isBelow(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// helperCapabilities are those that the helper keeps in its user namespace where
// it is not root there.
func helperCapabilities() []uintptr {
	return []uintptr{
		unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_FOWNER, unix.CAP_KILL, unix.CAP_SETGID, unix.CAP_SETUID,
		unix.CAP_SETPCAP, unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE, unix.CAP_SYS_RESOURCE,
	}
}

// attributes are those of the helper. Users keep their numbers in the sandbox;
// those that are not needed there do not exist in it.
func attributes(opts *Options) *syscall.SysProcAttr {
	uid, gid := os.Geteuid(), os.Getegid()
	same := func(id int) syscall.SysProcIDMap {
		return syscall.SysProcIDMap{ContainerID: id, HostID: id, Size: 1}
	}
	a := &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		UidMappings: []syscall.SysProcIDMap{same(uid)},
		GidMappings: []syscall.SysProcIDMap{same(gid)},
	}
	if opts.Network == NoNetwork {
		a.Cloneflags |= unix.CLONE_NEWNET
	}
	if opts.User.Set {
		a.GidMappingsEnableSetgroups = true // to have none
		if opts.User.UID != uid {
			a.UidMappings = append(a.UidMappings, same(opts.User.UID))
		}
		if opts.User.GID != gid {
			a.GidMappings = append(a.GidMappings, same(opts.User.GID))
		}
	}
	if opts.Identity == AsNobody && !opts.User.Set {
		a.UidMappings[0].ContainerID, a.GidMappings[0].ContainerID = nobody, nobody
		uid = nobody
	}
	if uid != 0 {
		a.AmbientCaps = helperCapabilities()
	}
	return a
}

// IsHelper reports whether this process was started by this package. If so, all
// that it does is HelperMain.
func IsHelper() bool { return helper.Is(helperName) }

// HelperMain is the main of a process for which IsHelper is true. It returns
// its exit code.
func HelperMain() int { return helper.Main(&cell{}) }
