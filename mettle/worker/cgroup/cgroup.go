//go:build linux

// Package cgroup holds commands to limits of memory, CPU time and processes by
// Linux control groups, and measures what they use. It knows versions 1 and 2, and
// machines that have both.
//
// Open finds the worker's own groups, finds out which controllers it may use below
// them, and makes one group there for all that this worker runs. Partly permitted is
// normal: Missing tells what is not, and why. NewGroup makes a group for one slot's
// commands. Nothing but commands is ever in it, so it may be killed as a whole, and
// the helper that starts them survives the end of their memory:
//
//   - Version 2: the helper stays where it is, and clones each command into the group
//     (clone3 with CLONE_INTO_CGROUP, Linux 5.7).
//   - Version 1: the one thread of the helper that starts commands is in the groups
//     for good, and so is what it starts. The kernel counts the memory of a process to
//     the group of its first thread, which this is not, and looks for victims among
//     first threads.
//
// So a command is in its group before its first instruction, at no cost. The groups
// themselves cost nothing that can be seen, but those of the controller CPU: on a busy
// machine a command took twice as long in one. Options say which are wanted. Version 2
// lets a group with processes of its own have none below it with controllers: where
// the worker is alone in its group, it moves to one beside those of its commands.
// It never moves another's process.
//
// The group of a worker is locked (flock) while it lives. Those that nobody has
// locked were left by workers that were killed: Open ends what is in them and
// removes them. Group is the worker's side and Inside the helper's; Handover and
// Take are the way from one to the other. It is called by worker and runner/helper.
package cgroup

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Controller is what a control group bounds.
type Controller string

// The controllers, by the kernel's names.
const (
	Memory    Controller = "memory"
	CPU       Controller = "cpu"
	Processes Controller = "pids"
	// accounting measures CPU time, in version 1.
	accounting Controller = "cpuacct"
)

// ErrMissing: this machine, or whoever started the worker, does not let it use a
// controller.
var ErrMissing = errors.New("control groups can't be used")

// Options are those of Open.
type Options struct {
	// Root is where /proc and the hierarchies are found. Default: "/".
	Root string
	// Controllers are those to use: each has its price for every process. Default: all.
	Controllers []Controller
	// Logger gets what became of the groups of dead workers. Default: discard.
	Logger *slog.Logger

	mkdir func(string) error // default: os.Mkdir
	fake  bool               // the groups are plain files: nothing can be put there
}

// Tree is the groups of one worker. Its methods are safe for concurrent use.
type Tree struct {
	o       Options
	bases   []base
	missing map[Controller]error

	// mu guards the number of groups that were made.
	mu    sync.Mutex
	count int
}

// base is the worker's group for commands in one hierarchy.
type base struct {
	version     int
	controllers []Controller
	dir         string
	lock        *os.File
}

const (
	// prefix is that of the groups that are ours.
	prefix = "mettle-"
	// leaf is where a worker goes that was alone in its group.
	leaf = prefix + "worker"
)

// Open finds out what this machine permits, and removes what dead workers left.
// Where it permits nothing, the Tree is of no use, but no error.
func Open(o Options) *Tree {
	if o.Root == "" {
		o.Root = "/"
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if len(o.Controllers) == 0 {
		o.Controllers = []Controller{Memory, CPU, Processes}
	}
	if o.mkdir == nil {
		o.mkdir = func(dir string) error { return os.Mkdir(dir, 0o755) } //nolint:gosec // control groups are no secret
	}
	t := &Tree{o: o, missing: map[Controller]error{}}
	hierarchies := find(o.Root)
	for _, c := range []Controller{Memory, CPU, Processes} {
		t.missing[c] = fmt.Errorf("%w: no hierarchy with the controller %s is mounted here, or the worker's own group is not in sight", ErrMissing, c)
	}
	for _, h := range hierarchies {
		if h.version == 2 {
			t.open2(h.dir)
		} else {
			t.open1(h)
		}
	}
	return t
}

// Missing returns nil if groups bound what c says, and otherwise an error that wraps
// ErrMissing and says why not. It is asked for what is in Options.Controllers.
func (t *Tree) Missing(c Controller) error { return t.missing[c] }

// isOurs reports whether a worker may have groups in the hierarchy of a controller.
func isOurs(controller string) bool {
	switch c := Controller(controller); c {
	case Memory, CPU, Processes, accounting:
		return true
	default:
		return false
	}
}

// lacks returns those of cs that are to be used and that no hierarchy has given yet.
func (t *Tree) lacks(cs []string) []Controller {
	var all []Controller
	for _, c := range t.o.Controllers {
		if slices.Contains(cs, string(c)) && t.missing[c] != nil {
			all = append(all, c)
		}
	}
	// Where time is measured together with what divides it, that has its price.
	if slices.Contains(cs, string(accounting)) && (len(cs) == 1 || slices.Contains(all, CPU)) {
		all = append(all, accounting)
	}
	return all
}

// found notes what became of cs.
func (t *Tree) found(cs []Controller, err error) {
	for _, c := range cs {
		if c == accounting {
			continue // what it measures is known otherwise too
		}
		if err == nil {
			delete(t.missing, c)
		} else {
			t.missing[c] = fmt.Errorf("%w: controller %s: %w", ErrMissing, c, err)
		}
	}
}

// open1 makes the group in a hierarchy of version 1.
func (t *Tree) open1(h hierarchy) {
	if slices.ContainsFunc(h.controllers, isOurs) {
		t.sweep(h.dir) // a worker before may have used others
	}
	cs := t.lacks(h.controllers)
	if len(cs) == 0 {
		return
	}
	b, err := t.newBase(h.dir)
	if err == nil {
		b.version, b.controllers = 1, cs
		if err = t.tryThread(b.dir); err == nil {
			t.bases = append(t.bases, b)
		} else {
			b.remove()
		}
	}
	t.found(cs, err)
}

// tryThread finds out whether a thread can be put into a group below dir.
func (t *Tree) tryThread(dir string) error {
	if t.o.fake {
		return nil
	}
	dir = filepath.Join(dir, "try")
	if err := t.o.mkdir(dir); err != nil {
		return err
	}
	err := onThrowawayThread(func() error { return write(filepath.Join(dir, tasksFile), "0") })
	return errors.Join(err, removeGroup(dir, removeTimeout))
}

// onThrowawayThread runs f on a thread that ends with it, and is not the first of the
// process: that one never ends.
func onThrowawayThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != os.Getpid() {
			done <- f()
			return
		}
		err := onThrowawayThread(f)
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

// newBase makes and locks a group for this worker in own, the worker's group.
func (t *Tree) newBase(own string) (base, error) {
	for range 5 {
		dir := filepath.Join(own, prefix+strings.ToLower(rand.Text()[:8]))
		if err := t.o.mkdir(dir); err != nil {
			return base{}, err
		}
		lock, err := lockGroup(dir)
		if err != nil {
			return base{}, errors.Join(err, os.Remove(dir))
		}
		if lock != nil {
			return base{dir: dir, lock: lock}, nil
		}
	}
	return base{}, errors.New("another worker removes each group that is made")
}

// lockGroup locks the group at dir; the lock is nil where somebody else has it, or
// it is gone.
func lockGroup(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil //nolint:nilnil // as said
	}
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		var mine, there unix.Stat_t
		if err = unix.Fstat(int(f.Fd()), &mine); err == nil {
			err = unix.Stat(dir, &there)
		}
		if err == nil && mine.Ino == there.Ino {
			return f, nil
		}
	}
	f.Close() //nolint:errcheck // nothing was written
	if err == nil || errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, unix.ENOENT) {
		return nil, nil //nolint:nilnil // as said
	}
	return nil, fmt.Errorf("lock %s: %w", dir, err)
}

// remove gives the group up. What still is in it remains, for the next worker to
// remove.
func (b *base) remove() {
	_ = removeGroup(b.dir, removeTimeout)
	b.lock.Close() //nolint:errcheck // nothing was written
}

// What bounds the removal of the groups of dead workers at one start.
const (
	maxSwept     = 64
	sweepTimeout = 5 * time.Second
)

// sweep removes the groups in own that dead workers left.
func (t *Tree) sweep(own string) {
	entries, err := os.ReadDir(own)
	if err != nil {
		return
	}
	swept, deadline := 0, time.Now().Add(sweepTimeout)
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), prefix) || e.Name() == leaf || swept == maxSwept {
			continue
		}
		dir := filepath.Join(own, e.Name())
		lock, err := lockGroup(dir)
		if err != nil || lock == nil {
			continue
		}
		swept++
		if err := removeTree(dir, deadline); err != nil {
			t.o.Logger.Warn("a control group that a dead worker left could not be removed", "group", dir, "error", err)
		} else {
			t.o.Logger.Info("removed a control group that a dead worker left", "group", dir)
		}
		lock.Close() //nolint:errcheck // nothing was written
	}
}

// removeTree ends what is in the group at dir and below, and removes it.
func removeTree(dir string, deadline time.Time) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			killGroup(filepath.Join(dir, e.Name()))
		}
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeGroup(filepath.Join(dir, e.Name()), time.Until(deadline)))
		}
	}
	return errors.Join(err, removeGroup(dir, time.Until(deadline)))
}

// removeTimeout is how long the kernel may take to forget the processes of a group
// that have ended.
const removeTimeout = 2 * time.Second

// removeGroup removes an empty group, as soon as the kernel has noticed that it is.
func removeGroup(dir string, timeout time.Duration) error {
	for start, pause := time.Now(), time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Since(start) > timeout {
			return &os.PathError{Op: "remove", Path: dir, Err: err}
		}
		time.Sleep(pause)
	}
}

// Close removes the groups. Those of NewGroup are closed before.
func (t *Tree) Close() error {
	var all error
	for _, b := range t.bases {
		all = errors.Join(all, removeGroup(b.dir, removeTimeout), b.lock.Close())
	}
	t.bases = nil
	return all
}
