//go:build linux

package persistent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

// place makes the inputs of an action, but for the tool's, and moves them to where
// the process sees them.
func (p *process) place(ctx context.Context, req *Request, in *inputs) error {
	err := req.Inputs.build(ctx, inputroot.Request{Dir: p.next, Digest: in.rest, Owner: p.owner, Directories: req.Directories})
	if err != nil {
		return err
	}
	from, err := openDir(unix.AT_FDCWD, p.next)
	if err != nil {
		return err
	}
	defer unix.Close(from) //nolint:errcheck // opened for reading
	to, err := openDir(unix.AT_FDCWD, p.root)
	if err != nil {
		return err
	}
	defer unix.Close(to) //nolint:errcheck // only a place
	if err := merge(from, to, 0); err != nil {
		return fmt.Errorf("%w: place the inputs: %w", errProcess, err)
	}
	return inputroot.Remove(p.next)
}

// openDir opens a directory, which is not behind a symlink.
func openDir(at int, name string) (int, error) {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return fd, nil
}

// merge moves what is in one directory to another, in which there may be directories
// of the same names. The process lives, and can change what it sees at any moment:
// so each name is one of an open directory, and no symlink is followed.
func merge(from, to, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("over %d directories within each other", maxDepth)
	}
	names, err := namesIn(from)
	if err != nil {
		return err
	}
	for _, name := range names {
		err := unix.Renameat2(from, name, to, name, unix.RENAME_NOREPLACE)
		if err == nil {
			continue
		}
		if !errors.Is(err, unix.EEXIST) {
			return &os.PathError{Op: "rename", Path: name, Err: err}
		}
		if err := mergeDirectory(from, to, name, depth); err != nil {
			return err
		}
	}
	return nil
}

func mergeDirectory(from, to int, name string, depth int) error {
	f, err := openDir(from, name)
	if err != nil {
		return fmt.Errorf("there is something in its place: %w", err)
	}
	defer unix.Close(f) //nolint:errcheck // opened for reading
	t, err := openDir(to, name)
	if err != nil {
		return fmt.Errorf("there is something in its place: %w", err)
	}
	defer unix.Close(t) //nolint:errcheck // only a place
	return merge(f, t, depth+1)
}

// namesIn lists a directory.
func namesIn(fd int) ([]string, error) {
	again, err := openDir(fd, ".")
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(again), "directory")
	defer f.Close() //nolint:errcheck // opened for reading
	return f.Readdirnames(-1)
}

// keptDir is a directory that a process keeps between actions.
type keptDir struct {
	identity
	dirs  map[string]*keptDir
	files map[string]identity // and symlinks
}

// identity is what tells a file from another, as far as that is in its inode. The
// number of its names is not: a tool's file may be a link to the store's.
type identity struct {
	dev, ino uint64
	mode     uint32
	uid, gid uint32
	size     int64     // of files
	mtime    time.Time // of files
}

func identify(info os.FileInfo) (identity, error) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return identity{}, fmt.Errorf("%s: no inode is known", info.Name())
	}
	id := identity{dev: uint64(st.Dev), ino: st.Ino, mode: st.Mode, uid: st.Uid, gid: st.Gid} //nolint:unconvert // of another size elsewhere
	if !info.IsDir() {
		id.size, id.mtime = info.Size(), info.ModTime()
	}
	return id, nil
}

// scan lists what is in a directory, before the process runs.
func scan(dir string) (*keptDir, error) {
	r, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer r.Close() //nolint:errcheck // only a handle
	info, err := r.Lstat(".")
	if err != nil {
		return nil, err
	}
	return scanDir(r, ".", info)
}

func scanDir(r *os.Root, dir string, info os.FileInfo) (*keptDir, error) {
	k := &keptDir{dirs: make(map[string]*keptDir), files: make(map[string]identity)}
	var err error
	if k.identity, err = identify(info); err != nil {
		return nil, err
	}
	names, err := list(r, dir)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		p := path.Join(dir, name)
		info, err := r.Lstat(p)
		if err != nil {
			return nil, err
		}
		if info.IsDir() {
			k.dirs[name], err = scanDir(r, p, info)
		} else {
			k.files[name], err = identify(info)
		}
		if err != nil {
			return nil, err
		}
	}
	return k, nil
}

func list(r *os.Root, dir string) ([]string, error) {
	f, err := r.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	return f.Readdirnames(-1)
}

var errChanged = errors.New("it has changed its own files")

// clean removes all from the root but what is kept. An error means that the process
// is to be ended: it has changed what is kept, or made what can't be removed in this
// way. All paths are resolved beneath the root, whatever the process does meanwhile.
func (p *process) clean() error {
	r, err := os.OpenRoot(p.root)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // only a handle
	s := sweep{Root: r, same: true, extra: r.RemoveAll}
	return errors.Join(inputroot.Remove(p.next), s.directory(".", p.kept))
}

// untouched reports, by an error, whether there are files in the root that were not
// there after clean. It looks at names only, which is quick.
func (p *process) untouched() error {
	r, err := os.OpenRoot(p.root)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // only a handle
	s := sweep{Root: r, extra: func(name string) error {
		return fmt.Errorf("%w: it made %.200q while it had nothing to do", errChanged, name)
	}}
	return s.directory(".", p.kept)
}

// sweep compares a root with what is to be in it.
type sweep struct {
	*os.Root
	same  bool                    // look at each file and directory, not only at names
	extra func(name string) error // sees to what is too much
}

func (s *sweep) directory(dir string, k *keptDir) error {
	if err := s.compare(dir, k.identity); err != nil {
		return err
	}
	names, err := list(s.Root, dir)
	if err != nil {
		return err
	}
	left := len(k.dirs) + len(k.files)
	for _, name := range names {
		p := path.Join(dir, name)
		if sub, ok := k.dirs[name]; ok {
			left--
			err = s.directory(p, sub)
		} else if want, ok := k.files[name]; ok {
			left--
			err = s.compare(p, want)
		} else {
			err = s.extra(p)
		}
		if err != nil {
			return err
		}
	}
	if left > 0 {
		return fmt.Errorf("%w: some of %.200q are gone", errChanged, dir)
	}
	return nil
}

// compare reports, by an error, whether there is another file at p.
func (s *sweep) compare(p string, want identity) error {
	if !s.same {
		return nil
	}
	info, err := s.Lstat(p)
	if err != nil {
		return fmt.Errorf("%w: %w", errChanged, err)
	}
	if id, err := identify(info); err != nil || id != want {
		return errors.Join(err, fmt.Errorf("%w: %.200q", errChanged, p))
	}
	return nil
}
