//go:build linux

package helper

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// A command's files are added up while it runs, by a walk through its root, which
// takes a microsecond or two for each file. So the size of the file system's free
// space is looked at first, which takes one: as long as that has not become less by
// what the command may still write, there is nothing to add up. Because others may have
// freed what it wrote, there is a walk now and then all the same. What a command can
// write beyond its quota is thus what the disk takes within quotaEvery and the time
// of a walk, and as much as others free meanwhile within quotaWalk.
const (
	// quotaFirst is how long a command runs that nobody looks at.
	quotaFirst = 200 * time.Millisecond
	// quotaEvery is how often the free space is looked at.
	quotaEvery = 250 * time.Millisecond
	// quotaWalk is the time until a walk that nothing gives cause to.
	quotaWalk = 5 * time.Second
	// quotaShare is the share of the time that walks may take: a 20th, and a third
	// where there is cause.
	quotaShare, quotaUrgentShare = 20, 3
	// quotaLate is how long a command has run that is walked after at its end, though
	// nothing gives cause to.
	quotaLate = 2 * time.Second
	// minFileBytes is what a file counts at least, or a million empty ones would be
	// nothing.
	minFileBytes = 1024
)

// quota watches what commands write below their roots. The zero quota does not.
type quota struct {
	limit int64
	uid   int    // as which commands run; -1: the helper's own
	proc  string // a /proc that has commands, and nobody else of that user; "": there is none

	root      string
	started   time.Time
	next      time.Time     // when to look
	walked    time.Time     // when the last walk ended
	took      time.Duration // that one
	used      int64         // what it found
	freeStart int64
	freeWalk  int64 // free space at the last walk
}

// begin is called before a command starts.
func (q *quota) begin(root string) {
	if q.limit == 0 {
		return
	}
	now := time.Now()
	free := freeBytes(root)
	*q = quota{
		limit: q.limit, uid: q.uid, proc: q.proc, root: root, started: now, next: now.Add(quotaFirst), walked: now,
		freeStart: free, freeWalk: free,
	}
}

// timeout is how long to wait before look is called.
func (q *quota) timeout(otherwise time.Duration) time.Duration {
	if q.limit == 0 {
		return otherwise
	}
	return max(time.Millisecond, min(otherwise, time.Until(q.next)))
}

// look reports whether the command has written too much, if it is time to look. It
// gives up when stop says so.
func (q *quota) look(stop func() bool) (over bool) {
	now := time.Now()
	if q.limit == 0 || now.Before(q.next) {
		return false
	}
	q.next = now.Add(quotaEvery)
	urgent := q.freeWalk-freeBytes(q.root) > q.limit-q.used
	if urgent && now.Sub(q.walked) < quotaUrgentShare*q.took || !urgent && now.Sub(q.walked) < max(quotaWalk, quotaShare*q.took) {
		return false
	}
	return q.walk(stop)
}

// last reports whether a command that has ended has written too much.
func (q *quota) last(c *child, stop func() bool) bool {
	if c.status.Signaled() && c.status.Signal() == unix.SIGXFSZ {
		return true
	}
	// A shell tells of a program's signal by its own exit code.
	told := c.status.Exited() && c.status.ExitStatus() == 128+int(unix.SIGXFSZ)
	if !told && time.Since(q.started) < quotaLate && q.freeStart-freeBytes(q.root) < q.limit/4 {
		return false
	}
	return q.walk(stop)
}

func (q *quota) walk(stop func() bool) (over bool) {
	start := time.Now()
	q.freeWalk = freeBytes(q.root)
	w := walker{since: q.started, limit: q.limit, uid: q.uid, stop: stop}
	w.walk(q.root)
	var st unix.Stat_t
	if q.proc != "" && w.total <= q.limit && unix.Stat(q.root, &st) == nil {
		w.addUnlinked(q.proc, st.Dev)
	}
	q.used = max(0, w.total)
	q.walked = time.Now()
	q.took = q.walked.Sub(start)
	return w.total > q.limit
}

func freeBytes(path string) int64 {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0
	}
	return int64(st.Bfree) * st.Bsize //nolint:gosec // no disk has 8 EiB
}

// walker adds up what was written below a directory since a time. The tree may
// change while it goes: it follows no symlink, and goes up only to where it came from.
type walker struct {
	since time.Time
	limit int64
	uid   int
	stop  func() bool

	total int64
	seen  int
	links map[inode]int // how many links of a file were seen
	buf   [8192]byte
}

type inode struct{ dev, ino uint64 }

// level is a directory on the way, with those in it that are still to be looked at.
type level struct {
	inode
	dirs []string
}

const dirFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC

// walk goes through root until it is done, over the limit, stopped, or lost.
func (w *walker) walk(root string) {
	fd, err := unix.Open(root, dirFlags, 0)
	if err != nil {
		return
	}
	levels := []level{w.read(fd)}
	for w.total <= w.limit && !w.isStopped() {
		top := &levels[len(levels)-1]
		if n := len(top.dirs); n > 0 {
			sub, err := unix.Openat(fd, top.dirs[n-1], dirFlags, 0)
			top.dirs = top.dirs[:n-1]
			if err != nil {
				continue // it has gone, or may not be read
			}
			unix.Close(fd) //nolint:errcheck // only read
			fd = sub
			levels = append(levels, w.read(fd))
			continue
		}
		if len(levels) == 1 {
			break
		}
		levels = levels[:len(levels)-1]
		up, err := unix.Openat(fd, "..", dirFlags, 0)
		if err != nil {
			break
		}
		unix.Close(fd) //nolint:errcheck // only read
		fd = up
		if at, err := inodeOf(fd); err != nil || at != levels[len(levels)-1].inode {
			break // it was moved
		}
	}
	unix.Close(fd) //nolint:errcheck // only read
}

func inodeOf(fd int) (inode, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	return inode{st.Dev, st.Ino}, err
}

// isStopped asks only now and then, because it takes as long as a file.
func (w *walker) isStopped() bool { return w.seen%64 == 0 && w.stop() }

// read counts what is in a directory.
func (w *walker) read(fd int) level {
	at, err := inodeOf(fd)
	l := level{inode: at}
	var names []string
	for err == nil && w.total <= w.limit {
		n, readErr := unix.ReadDirent(fd, w.buf[:])
		if errors.Is(readErr, unix.EINTR) {
			continue
		}
		if readErr != nil || n <= 0 {
			break
		}
		_, _, names = unix.ParseDirent(w.buf[:n], -1, names[:0])
		for _, name := range names {
			var st unix.Stat_t
			if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				continue
			}
			w.count(&st)
			if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				l.dirs = append(l.dirs, name)
			}
		}
		if w.isStopped() {
			break
		}
	}
	return l
}

// count adds a file or directory, unless it is an input: nobody can set the time of a
// file's last change to one before the command. The links of an input are changed
// when another action gets one; but then not all of them are here.
func (w *walker) count(st *unix.Stat_t) {
	w.seen++
	if !time.Unix(st.Ctim.Unix()).After(w.since) {
		return
	}
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if w.links == nil {
			w.links = map[inode]int{}
		}
		id := inode{st.Dev, st.Ino}
		w.links[id]++
		own := w.uid >= 0 && int(st.Uid) == w.uid
		if own && w.links[id] > 1 || !own && w.links[id] != int(st.Nlink) { //nolint:gosec // no file has so many
			return
		}
	}
	w.total += max(st.Blocks*512, minFileBytes)
}
