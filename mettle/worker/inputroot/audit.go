//go:build linux

package inputroot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Audit looks whether the command has changed an input that is also the store's
// blob. If so, the store has withdrawn the blob, and the error wraps
// blob.ErrCorrupt. Under a policy other than LinkAndAudit it does nothing.
func (r *Root) Audit(ctx context.Context) error {
	switch {
	case r.auditor == nil:
		return nil
	case r.kept != nil:
		return r.auditKept(ctx)
	}
	var all error
	for _, l := range r.linked {
		all = errors.Join(all, r.auditLink(ctx, l))
	}
	return all
}

// auditLink asks the store.
func (r *Root) auditLink(ctx context.Context, l link) error {
	err := r.auditor.Audit(ctx, l.digest, l.mode, r.begun)
	switch {
	case errors.Is(err, blob.ErrNotFound):
		// Another slot's audit was first.
		return fmt.Errorf("input %s: %w: it was withdrawn while the command ran", l.digest, blob.ErrCorrupt)
	case err != nil:
		return fmt.Errorf("input %s: %w", l.digest, err)
	}
	return nil
}

// auditKept looks at each link of a root of which it is known what it was like. Those
// that are not as they were, or not there, it leaves to the store to judge, by changes
// since the root was taken: what was linked before was looked at then.
func (r *Root) auditKept(ctx context.Context) error {
	// Where this fails the command has removed its root, and each link is asked for.
	fd, err := unix.Open(r.kept.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd) //nolint:errcheck // only a handle
	}
	var all error
	r.kept.root.eachFile(".", func(n *node, i int, path string) {
		f, want := &n.files[i], &n.dir.files[i]
		if !f.linked || all != nil && ctx.Err() != nil {
			return
		}
		state := fileGone
		if err == nil {
			state = f.look(fd, path, want)
		}
		switch state {
		case fileSound:
			return
		case fileGone:
			all = errors.Join(all, r.auditGone(ctx, want))
			return
		case fileChanged, fileOther:
		}
		if state == fileOther {
			// Of the bytes the store can't know, unless it is told: so its own look
			// finds that they are not as it left them.
			_ = unix.UtimesNanoAt(fd, path, touched(), unix.AT_SYMLINK_NOFOLLOW)
		}
		err := r.auditLink(ctx, linkOf(want))
		if err == nil && state == fileOther {
			err = fmt.Errorf("input %s: %w: the command has written to it", want.digest, blob.ErrCorrupt)
		}
		all = errors.Join(all, err)
	})
	return all
}

// auditGone looks at an input that is not where it was: a command may remove its
// inputs, but what it has written to one before that would show no more. So the bytes
// are read that the next action would get.
func (r *Root) auditGone(ctx context.Context, want *fileNode) error {
	l := linkOf(want)
	switch err := r.auditor.Audit(ctx, l.digest, l.mode, r.begun); {
	case errors.Is(err, blob.ErrNotFound):
		return nil // evicted: nobody gets it any more
	case err != nil:
		return fmt.Errorf("input %s: %w", l.digest, err)
	}
	path := r.kept.dir + ".audit" // which no command in a sandbox sees
	defer unix.Unlink(path)       //nolint:errcheck // mostly it is there, and else a slot's clean finds it
	switch err := r.kept.builder.linker.Link(ctx, l.digest, path, l.mode); {
	case errors.Is(err, blob.ErrNotFound), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EACCES), errors.Is(err, unix.ENOTDIR):
		return nil // evicted; or a command has closed the slot to us, which could write to the store itself
	case err != nil:
		return fmt.Errorf("input %s: look at it again: %w", l.digest, err)
	}
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("input %s: look at it again: %w", l.digest, err)
	}
	defer file.Close() //nolint:errcheck // opened for reading
	if _, err := io.Copy(io.Discard, digest.NewVerifier(file, l.digest.Plain())); errors.Is(err, digest.ErrMismatch) {
		_ = unix.UtimesNanoAt(unix.AT_FDCWD, path, touched(), unix.AT_SYMLINK_NOFOLLOW)
		return cmp.Or(r.auditLink(ctx, l), fmt.Errorf("input %s: %w: the command has written to it", l.digest, blob.ErrCorrupt))
	} else if err != nil {
		return fmt.Errorf("input %s: %w", l.digest, err)
	}
	return nil
}

// touched are times by which the store finds that a file is not as it left it.
func touched() []unix.Timespec {
	return []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_NOW}}
}

// eachFile calls visit for each file that is there, with its path below rel.
func (n *node) eachFile(rel string, visit func(n *node, i int, path string)) {
	for i := range n.files {
		if n.files[i].ino != 0 {
			visit(n, i, rel+"/"+n.dir.files[i].name)
		}
	}
	for i, c := range n.children {
		if c != nil {
			c.eachFile(rel+"/"+n.dir.children[i].name, visit)
		}
	}
}

// fileLook is what became of a file that its command could have changed.
type fileLook uint8

const (
	fileSound   fileLook = iota // it is what it was
	fileGone                    // it is not there
	fileChanged                 // it looks different, or can't be looked at
	fileOther                   // it looks as it did, and has other bytes
)

// look looks at the file at path, which is want's. Nobody can set a ctime: where that
// is as it was, all is. Where it is another, somebody has made or removed another link
// of the inode, as slots do, or has changed it and then set its times back: the
// bytes tell.
func (f *fileState) look(at int, path string, want *fileNode) fileLook {
	var st unix.Stat_t
	if err := unix.Fstatat(at, path, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil || st.Ino != f.ino {
		return fileGone
	}
	if !f.isLike(&st, want) {
		return fileChanged
	}
	if f.ctime != 0 && st.Ctim.Nano() == f.ctime {
		return fileSound
	}
	now := tick()
	switch same, err := f.holds(at, path, want); {
	case err != nil:
		return fileChanged
	case !same:
		return fileOther
	}
	f.ctime = 0
	if st.Ctim.Nano() < now {
		f.ctime = st.Ctim.Nano()
	}
	return fileSound
}

// isLike reports whether st is what can be seen of the file from outside.
func (f *fileState) isLike(st *unix.Stat_t, want *fileNode) bool {
	return st.Ino == f.ino && st.Mode == unix.S_IFREG|permOf(want.mode) && st.Size == want.digest.Size() && st.Mtim.Nano() == f.mtime
}

// holds reads the file.
func (f *fileState) holds(at int, path string, want *fileNode) (bool, error) {
	fd, err := unix.Openat(at, path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("open %s: %w", path, err)
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close() //nolint:errcheck // opened for reading
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || !f.isLike(&st, want) {
		return false, fmt.Errorf("stat %s: it was replaced: %w", path, err)
	}
	if _, err := io.Copy(io.Discard, digest.NewVerifier(file, want.digest.Plain())); errors.Is(err, digest.ErrMismatch) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("read %s: %w", path, err)
	}
	// Not before the bytes: it would keep us from reading them.
	if n, err := unix.Flistxattr(fd, nil); err == nil && n > 0 && !onlyLabels(fd) {
		return false, fmt.Errorf("%s: %w", path, errNotAsBuilt)
	}
	return true, nil
}
